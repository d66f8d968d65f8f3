"""Several ranks: two of them train what one does, with whole and with sharded weights; checkpoints pass between them.

All runs of two ranks are made by one pair of processes (this file as a program), because each pair takes seconds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from small_stages import SmallTable, networks, with_text_of_the_caller
from torch import Tensor, nn
from train_methods import recipe, write_corpus

from avatar_rt.errors import InputError
from training import checkpoint, parallel
from training.methods.flow import Bucket
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.recipe import Method, Recipe, common
from training.train import train

PLAIN = ("vae.decoder", "speech", "motion", "identity", "sync", "t2v", "a2v", "personality")
SILENT = (".audio_attn.o.weight", "motion_injection.weight", "anchor_patch_embedding.weight", "null_audio")
SHARDED = {"micro_batches": 2, "sharded": True, "sharded_dtype": "float32"}
SHARING = {"ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "ulysses, sharded": {"ulysses": 2, **SHARDED},
           "ulysses, from meta": {"ulysses": 2, "validate_every": 2, **SHARDED}}  # fmt: skip


class Ragged:
    """Sizes that two ranks cannot halve, a convolution, and a layer that only some batches use."""

    def __init__(self, sometimes: bool) -> None:
        self.sometimes = sometimes
        layers = [nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)) for _ in range(2)]
        self.module = nn.ModuleDict(
            {"blocks": nn.ModuleList(layers), "conv": nn.Conv1d(7, 5, 3, padding=1), "extra": nn.Linear(5, 1)}
        )

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(6, 7, generator=generator)
        target = x.sum(1, keepdim=True)
        for block in self.module["blocks"]:
            x = x + block(x)
        made = self.module["conv"](x.T[None])[0].T
        if not self.sometimes or torch.rand((), generator=generator) < 0.5:
            made = made + self.module["extra"](made)
        return {"loss": (made.mean(1, keepdim=True) - target).square().mean(), "samples": 6}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        (out / "seen.txt").write_text(str(step))
        with torch.no_grad():
            return {"loss": float(self.step(step, torch.Generator().manual_seed(5))["loss"])}

    def export(self, out: Path) -> None:
        torch.save(self.module.state_dict(), out / "ragged.pt")


class Signalled(Ragged):
    """The second rank alone is told to stop, in its second step."""

    def __init__(self) -> None:
        super().__init__(False)

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == 1 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(step, generator)


def _ragged(sometimes: bool, **fields: object) -> Recipe:
    def build(corpus: Path) -> Method:
        return Ragged(sometimes)

    base = Recipe("ragged", build, steps=4, lr=1e-2, warmup=1, ema=0.9, autocast=False, micro_batches=2,
                  log_every=1, validate_every=2, checkpoint_every=2)  # fmt: skip
    return replace(base, **fields)


def _recipes() -> dict[str, tuple[Recipe, int]]:
    """What is run by two ranks, and up to which step."""
    plain = {name: (replace(recipe(name), micro_batches=2), 2) for name in PLAIN}
    whole = replace(recipe("personality"), muon_lr=0.0, micro_batches=2)
    sharing = {key: (replace(whole, **fields), 2) for key, fields in SHARING.items()}
    sharing["ulysses, from meta"] = (replace(sharing["ulysses, from meta"][0], build=_on_meta), 2)
    return {
        **plain,
        **sharing,
        "sometimes": (_ragged(True), 4),
        "sharded personality": (replace(whole, **SHARDED), 2),
        "from meta": (replace(whole, build=_on_meta, **SHARDED), 2),
        "sharded": (_ragged(False, sharded=True, sharded_dtype="float32"), 4),
        "sharded muon": (_ragged(False, muon_lr=1e-2, conv_muon_lr=1e-2, sharded=True, sharded_dtype="float32"), 4),
        "sharded blocks": (_ragged(False, sharded=True, sharded_dtype="float32", recompute=True, compile="eager"), 4),
        "sharded bf16": (_ragged(False, sharded=True, autocast=True), 4),
    }


def _on_meta(corpus: Path) -> Method:
    """As the recipes of large models build theirs."""
    cfg = with_text_of_the_caller()
    table = SmallTable(cfg)
    with torch.device("meta"):
        method = PersonalityMethod(cfg, table, PersonalitySettings(buckets=(Bucket(3, people=2),)), 9)
    method.vae = networks(cfg).vae
    return method


def _as_two_ranks(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for key, (what, until) in _recipes().items():
        run = train(what, folder / "corpus", folder / "two" / key, until=until)
        whole = parallel.whole_state(run._state(), run.world)
        if run.world.is_first:
            torch.save((whole, run.samples), folder / f"{key}.pt")
    init = folder / "two" / "from meta" / "checkpoint-2"
    run = train(_recipes()["from meta"][0], folder / "corpus", folder / "two" / "begun", until=0, init=init)
    begun = parallel.whole_state(run._state(), run.world)
    if run.world.is_first:
        torch.save((begun, 0), folder / "begun.pt")
    for part, resume in ((2, False), (4, True)):
        run = train(_recipes()["sharded muon"][0], folder / "corpus", folder / "parts", until=part, resume=resume)
    whole = parallel.whole_state(run._state(), run.world)
    if run.world.is_first:
        torch.save((whole, run.samples), folder / "parts.pt")
    try:
        train(_ragged(False, build=lambda corpus: Signalled()), folder / "corpus", folder / "signalled")
    except KeyboardInterrupt as e:
        (folder / f"signalled-{run.world.rank}").write_text(str(e))
    torch.distributed.destroy_process_group()


def _as_four_ranks(folder: Path) -> None:
    run = train(_recipes()["ulysses"][0], folder / "corpus", folder / "four", until=2)
    if run.world.is_first:
        torch.save((run._state(), run.samples), folder / "four.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks made: <key>.pt, and two/<key> with the run."""
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "corpus")
    _run_ranks(folder, 2)
    return folder


def _run_ranks(folder: Path, size: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(folder)], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(size)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=400)[0] for rank in ranks]
        assert not any(rank.returncode for rank in ranks), "\n".join(told)[-4000:]
    finally:
        for rank in ranks:
            rank.kill()


def _state(two: Path, key: str) -> tuple[dict[str, Tensor], int]:
    return torch.load(two / f"{key}.pt", weights_only=True)


def _apart(a: dict[str, Tensor], b: dict[str, Tensor], part: str) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if k.startswith(part))


@functools.cache
def _one(two: Path, key: str) -> tuple[dict[str, Tensor], int]:
    what, until = _recipes()[key]
    run = train(replace(what, ulysses=1, ring=1), two / "corpus", two / "one" / key, until=until)
    return run._state(), run.samples


@pytest.mark.parametrize("key", [*PLAIN, "sometimes"])
def test_two_ranks_train_what_one_does(two: Path, key: str) -> None:
    """The same batches, shared or in turn. Adding two halves is exact, so even the bits agree."""
    (mine, seen), (theirs, theirs_seen) = _one(two, key), _state(two, key)
    assert seen == theirs_seen
    different = [k for k in mine if not torch.equal(mine[k], theirs[k])]
    assert mine.keys() == theirs.keys() and not different


@pytest.mark.parametrize(
    ("key", "limit"),
    [("sharded personality", 1e-6), ("from meta", 1e-6), ("sharded", 1e-6), ("sharded blocks", 1e-6),
     ("sharded muon", 2e-3), ("sharded bf16", 2e-3)],
)  # fmt: skip
def test_sharded_ranks_train_what_one_whole_does(two: Path, key: str, limit: float) -> None:
    """To rounding: of fp32; of bf16 in Muon's Newton-Schulz iteration, and in gathered weights; steps are of 1e-2."""
    mine, theirs = _one(two, key)[0], _state(two, key)[0]
    start = train(_recipes()[key][0], two / "corpus", two / "start" / key, until=0)
    moved = _apart(mine, start._state() | {k: v for k, v in mine.items() if k.startswith("optimiser.")}, "module.")
    assert _apart(mine, theirs, "module.") <= limit and moved > 4 * limit
    assert _apart(mine, theirs, "average.") <= limit


def test_ranks_that_hold_parts_validate_together(two: Path) -> None:
    """The same measures and the same sheet as one process's, of sharded weights and shared rows."""
    _one(two, "ulysses, from meta")
    runs = [two / size / "ulysses, from meta" for size in ("one", "two")]
    sheets = [cv2.imread(str(run / "validation" / "video-000002.png")).astype(int) for run in runs]
    assert sheets[0].std() > 1 and np.abs(sheets[0] - sheets[1]).max() <= 1
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    one, other = (next(line["val"] for line in text if "val" in line) for text in lines)
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("key", SHARING)
def test_ranks_that_share_a_batch_train_what_one_does(two: Path, key: str) -> None:
    """Rows of every pass spread over two ranks, whole weights and sharded ones: the same to rounding."""
    (mine, seen), (theirs, theirs_seen) = _one(two, key), _state(two, key)
    assert seen == theirs_seen and _apart(mine, theirs, "module.") <= 1e-5
    start = train(replace(_recipes()[key][0], ulysses=1, ring=1), two / "corpus", two / "start" / key, until=0)
    moved = start._state() | {k: v for k, v in mine.items() if k.startswith("optimiser.")}
    assert _apart(mine, moved, "module.") > 5e-4


def test_pairs_of_ranks_share_batches_and_pairs_draw_their_own(two: Path) -> None:
    _run_ranks(two, 4)
    (mine, seen), (theirs, theirs_seen) = _one(two, "ulysses"), _state(two, "four")
    assert seen == theirs_seen and _apart(mine, theirs, "module.") <= 1e-5


def test_sharing_that_cannot_be_is_refused(two: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this method's passes cannot be spread"):
        train(_ragged(True, ulysses=2), two / "corpus", tmp_path / "a", until=1)
    with pytest.raises(InputError, match="expects a multiple of 2 ranks, got 1"):
        train(_recipes()["ring"][0], two / "corpus", tmp_path / "b", until=1)


def test_weights_from_meta_are_filled_as_their_constructors_would_and_taken_up_in_parts(two: Path) -> None:
    what = replace(_recipes()["from meta"][0], sharded=False)
    start = train(what, two / "corpus", two / "start" / "filled", until=0)._state()
    for name, p in start.items():
        if name.startswith("module."):
            assert torch.isfinite(p).all()
            if name.endswith(SILENT):
                assert not p.any()
            elif p.ndim > 1:
                assert 0.005 < float(p.std()) < 0.5 and abs(float(p.mean())) < 0.1
    left, begun = _state(two, "from meta")[0], _state(two, "begun")[0]
    assert all(torch.equal(begun[f"module.{k[8:]}"], v) for k, v in left.items() if k.startswith("average."))


def test_sharded_runs_measure_and_export_whole_weights(two: Path) -> None:
    _one(two, "sharded")
    lines = [[json.loads(line) for line in (two / who / "sharded" / "metrics.jsonl").read_text().splitlines()]
             for who in ("one", "two")]  # fmt: skip
    for one, both in zip(*lines, strict=True):
        assert (one["step"], one["samples"]) == (both["step"], both["samples"])
        mine, theirs = one.get("val", one)["loss"], both.get("val", both)["loss"]
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert (two / "two" / "sharded" / "validation" / "seen.txt").read_text() == "4"
    one, both = (torch.load(two / who / "sharded" / "ragged.pt", weights_only=True) for who in ("one", "two"))
    for key in one:
        torch.testing.assert_close(both[key], one[key], atol=1e-6, rtol=0)


def test_sharded_runs_resume_bit_for_bit(two: Path) -> None:
    straight, parts = _state(two, "sharded muon")[0], _state(two, "parts")[0]
    assert straight.keys() == parts.keys() and all(torch.equal(straight[k], parts[k]) for k in straight)


def test_one_rank_takes_up_what_two_sharded_ones_left(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "two" / "sharded" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    run = train(_recipes()["sharded"][0], two / "corpus", tmp_path / "run", resume=True)
    assert run.step == 4 and _apart(run._state(), _state(two, "sharded")[0], "") <= 1e-5


def test_a_signal_to_one_rank_stops_all_at_one_step(two: Path) -> None:
    assert checkpoint.steps_of(two / "signalled") == [2]
    for rank in range(2):
        assert (two / f"signalled-{rank}").read_text() == "stopped at step 2 with a checkpoint"


def test_batches_that_ranks_cannot_share_are_refused() -> None:
    from training.loop import Run

    world = parallel.World(0, 2, torch.device("cpu"))
    with pytest.raises(InputError, match="multiple of the 2 ranks, got 3"):
        Run(_ragged(True, micro_batches=3), Ragged(True), Path(), world)


def test_what_ranks_choose_alike_differs_between_steps() -> None:
    a, b, c = (torch.rand(4, generator=common(step)) for step in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


if __name__ == "__main__":
    {"2": _as_two_ranks, "4": _as_four_ranks}[os.environ["WORLD_SIZE"]](Path(sys.argv[1]))
