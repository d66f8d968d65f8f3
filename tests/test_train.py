"""The training loop: resuming is bit-equal for every method, a killed run goes on, what is wrong is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from train_methods import BUILDS, recipe, write_corpus

from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.weights import save_weights
from training import checkpoint
from training.loop import HOPELESS, Run
from training.optimiser import learning_rate
from training.recipe import Method, Recipe, generator_of, merge
from training.train import main, train


class Toy:
    """Least squares with a hidden layer, batches drawn from the loop's generator; a count kept beside the module."""

    def __init__(self) -> None:
        self.module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 8)]), "out": nn.Linear(8, 1)})
        self.seen = torch.zeros((), dtype=torch.int64)

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=generator)
        self.seen += 1
        y = self.module["out"](torch.tanh(self.module["blocks"][0](x)) + 0.01 * torch.rand(8))  # torch's own generator
        return {"loss": (y - x.sum(1, keepdim=True)).square().mean(), "samples": 16}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        torch.rand(())  # must not matter
        (out / f"sheet-{step}.txt").write_text("a picture")
        with torch.no_grad():
            return {"error": float(self.step(step, torch.Generator().manual_seed(9))["loss"])}

    def export(self, out: Path) -> None:
        torch.save(self.module.state_dict(), out / "toy.pt")

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.copy_(state["seen"])

    def describe(self) -> dict[str, object]:
        return {"hidden": 8}


def _toy(corpus: Path, overfit: bool = False) -> Method:
    toy = Toy()
    if overfit:
        (corpus / "overfit").write_text("")
    return toy


RECIPE = Recipe(
    "toy", _toy, steps=40, lr=1e-2, muon_lr=1e-2, warmup=5, ema=0.9, autocast=False, checkpoint_every=20,
    validate_every=20, log_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _same(a: Run, b: Run) -> None:
    mine, theirs = a._state(), b._state()
    different = [k for k in mine if not torch.equal(mine[k], theirs[k])]
    assert mine.keys() == theirs.keys() and not different
    assert (a.step, a.samples, a.skipped) == (b.step, b.samples, b.skipped)


# Resuming


@pytest.mark.parametrize("name", BUILDS)
def test_resuming_is_bit_equal_for_every_method(name: str, corpus: Path, tmp_path: Path) -> None:
    straight = train(recipe(name), corpus, tmp_path / "a", until=4)
    train(recipe(name), corpus, tmp_path / "b", until=2)
    torch.manual_seed(123)  # the state that the second process happens to have
    resumed = train(recipe(name), corpus, tmp_path / "b", resume=True, until=4)
    assert straight.step == 4
    _same(straight, resumed)
    moved = torch.cat([p.detach().flatten() for p in straight.params])
    built = torch.cat([p.detach().flatten() for p in train(recipe(name), corpus, tmp_path / "c", until=0).params])
    assert (moved - built).abs().max() > 1e-4


def test_resuming_is_bit_equal_with_all_that_a_run_has(tmp_path: Path) -> None:
    for changed in ({}, {"micro_batches": 3, "schedule": "wsd", "recompute": True, "eval_before_first_step": True}):
        what, folder = replace(RECIPE, **changed), tmp_path / str(len(changed))
        straight = train(what, tmp_path, folder / "a")
        train(what, tmp_path, folder / "b", until=27)
        resumed = train(what, tmp_path, folder / "b", resume="latest")
        _same(straight, resumed)
        assert int(resumed.method.seen) > 40
        a, b = (torch.load(folder / run / "toy.pt", weights_only=True) for run in ("a", "b"))
        assert all(torch.equal(a[k], b[k]) for k in a)
        rows = [[json.loads(line) for line in (folder / run / "metrics.jsonl").open()] for run in ("a", "b")]
        assert [r["val"] for r in rows[0] if "val" in r] == [r["val"] for r in rows[1] if "val" in r]


def test_a_killed_run_goes_on_where_it_was(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment, twice: what is then resumed ends as if nothing had happened."""
    straight = train(recipe("motion"), corpus, tmp_path / "a", until=8)
    command = [sys.executable, str(Path(__file__).parent / "train_methods.py"), "motion", str(corpus),
               str(tmp_path / "b"), "9", "resume"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for reached in (2, 4):
        run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 120
        while max(checkpoint.steps_of(tmp_path / "b"), default=0) < reached and time.monotonic() < give_up:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() in (-signal.SIGKILL, 0)
        assert checkpoint.steps_of(tmp_path / "b")[-1] >= reached
    held = checkpoint.steps_of(tmp_path / "b")
    if held[-1] > 8:  # it was over before the signal came
        held = held[:-1]
    resumed = train(recipe("motion"), corpus, tmp_path / "b", resume=held[-1], until=8)
    _same(straight, resumed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").open()]
    assert steps == list(range(1, 9))


def test_a_signal_leaves_a_checkpoint_and_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Signalled(Toy):
        def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step, generator)

    what = replace(RECIPE, build=lambda corpus: Signalled())
    monkeypatch.setattr("training.train.find_recipe", lambda name: what)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--recipe", "toy", "--corpus", str(tmp_path), "--out", str(tmp_path / "a")]) == 130
    assert "--resume" in capsys.readouterr().err and checkpoint.steps_of(tmp_path / "a") == [8]
    assert signal.getsignal(signal.SIGTERM) is before
    _same(train(RECIPE, tmp_path, tmp_path / "a", resume=True), train(RECIPE, tmp_path, tmp_path / "b"))


# Checkpoints


def test_the_newest_checkpoints_are_kept_and_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoint-7.tmp").mkdir(parents=True)  # left by a run that was killed
    train(replace(RECIPE, checkpoint_every=5, keep_checkpoints=3), tmp_path, out, until=22)
    assert checkpoint.steps_of(out) == [15, 20, 22] and not list(out.glob("*.tmp"))
    notes = json.loads((out / "checkpoint-22" / "metadata.json").read_text())
    assert notes["recipe"] == "toy" and notes["samples"] == 22 * 16 and notes["method"] == {"hidden": 8}
    assert notes["config"]["muon_lr"] == 1e-2 and notes["config"]["build"].endswith("_toy") and notes["ranks"] == 1
    train(RECIPE, tmp_path, out, resume=15, until=16)  # another history from here
    assert checkpoint.steps_of(out) == [15, 16]


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    train(replace(RECIPE, checkpoint_minutes=1e-9, keep_checkpoints=9), tmp_path, tmp_path / "a", until=3)
    assert checkpoint.steps_of(tmp_path / "a") == [1, 2, 3]
    run = train(RECIPE, tmp_path, tmp_path / "b", minutes=1e-9)
    assert run.step == 1 and checkpoint.steps_of(tmp_path / "b") == [1] and not (tmp_path / "b" / "toy.pt").exists()


def test_a_wrong_resume_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(RECIPE, tmp_path, out, resume=True, until=2).step == 2  # nothing there yet: from the start
    with pytest.raises(InputError, match=r"holds checkpoints; add --resume"):
        train(RECIPE, tmp_path, out)
    with pytest.raises(InputError, match=r"--resume 5: expected latest or the step of a checkpoint in .* \(2\)"):
        train(RECIPE, tmp_path, out, resume=5)
    with pytest.raises(InputError, match="holds a run of recipe 'toy', got 'other'"):
        train(replace(RECIPE, name="other"), tmp_path, out, resume=True)
    with pytest.raises(ArtifactError, match=r"does not fit this run, tensors are \d+ unknown \(average"):
        train(replace(RECIPE, ema=0.0), tmp_path, out, resume=True)
    shard = next((out / "checkpoint-2" / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(RECIPE, tmp_path, out, resume=True)


def test_what_changed_since_the_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(RECIPE, tmp_path, tmp_path / "a", until=2)
    train(replace(RECIPE, lr=0.5), tmp_path, tmp_path / "a", resume=True, until=3)
    assert "with lr 0.5 (was 0.01)" in capsys.readouterr().out


def test_a_run_may_start_from_parts_or_a_checkpoint(tmp_path: Path) -> None:
    first = train(replace(RECIPE, steps=3, ema=0.0), tmp_path, tmp_path / "a")
    for name, part in first.method.module.named_children():
        save_weights(part, tmp_path / f"{name}.safetensors", dtype=torch.float32)
    save_weights(first.method.module, tmp_path / "all.safetensors", dtype=torch.float32)
    for init in (tmp_path, tmp_path / "a", tmp_path / "a" / "checkpoint-3", tmp_path / "all.safetensors"):
        again = train(RECIPE, tmp_path, tmp_path / "b", init=init, until=0)
        for a, b in zip(first.params, again.params, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(again.average.state["out.bias"], again.method.module["out"].bias)
    moved = train(RECIPE, tmp_path, tmp_path / "c", init=tmp_path, until=1)
    assert not torch.equal(moved.params[0], first.params[0])  # what was loaded is what is trained
    with pytest.raises(InputError, match=r"blocks.safetensors, out.safetensors is not there"):
        train(RECIPE, tmp_path, tmp_path / "d", init=tmp_path / "nowhere")


def _parts_of(run: Run, folder: Path) -> Path:
    folder.mkdir()
    with run.averaged():
        for name, part in run.method.module.named_children():
            save_weights(part, folder / f"{name}.safetensors", dtype=torch.float32)
    return folder


def test_a_grown_module_starts_from_the_smaller_ones_average(tmp_path: Path, capsys) -> None:
    class Grown(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.module["added"] = nn.Linear(2, 2)

    first = train(RECIPE, tmp_path, tmp_path / "a", until=6)
    grown = train(replace(RECIPE, build=lambda corpus: Grown()), tmp_path, tmp_path / "b", init=tmp_path / "a", until=0)
    assert torch.equal(grown.method.module["out"].weight, first.average.state["out.weight"])

    class Stage(Grown):
        def adopt(self, state: dict[str, Tensor], source: str) -> list[str]:
            self.module.load_state_dict(state, strict=False)
            return ["added.weight", "added.bias"]

    for at, init in (("c", tmp_path / "a"), ("d", _parts_of(first, tmp_path / "parts"))):
        stage = train(replace(RECIPE, build=lambda corpus: Stage()), tmp_path, tmp_path / at, init=init, until=0)
        assert torch.equal(stage.method.module["out"].weight, first.average.state["out.weight"])
    assert capsys.readouterr().out.count("but for 2 tensors that this stage adds") == 2

    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.module["out"] = nn.Linear(8, 2)

    with pytest.raises(InputError, match=r"but out.weight is \[1, 8\] there"):
        train(replace(RECIPE, build=lambda corpus: Wider()), tmp_path, tmp_path / "e", init=tmp_path / "a", until=0)


# Steps


def test_it_learns(tmp_path: Path) -> None:
    run = train(replace(RECIPE, steps=300), tmp_path, tmp_path)
    before = Toy().validate(0, tmp_path)["error"]
    with run.averaged():
        assert run.method.validate(0, tmp_path)["error"] < 0.2 * before


def test_a_batch_depends_on_seed_step_and_number_alone() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    drawn = [torch.rand(3, generator=generator_of(*key)) for key in keys]
    assert torch.equal(drawn[0], torch.rand(3, generator=generator_of(0, 0, 0)))
    assert len({tuple(d.tolist()) for d in drawn}) == 4


def test_micro_batches_are_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """One step of plain descent on two batches, against the gradients by hand."""
    what = replace(RECIPE, micro_batches=2, clip=0.0)
    run = train(what, tmp_path, tmp_path / "a", until=0)
    grads = []
    for number in range(2):
        values = run._draw(0, number)
        grads.append(torch.autograd.grad(values["loss"], run.params))
    run.train_step()
    for p, a, b in zip(run.params, *grads, strict=True):
        torch.testing.assert_close(p.grad, (a + b) / 2)


def test_steps_without_a_finite_gradient_are_left_out_and_counted(tmp_path: Path) -> None:
    class Broken(Toy):
        def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            values = super().step(step, generator)
            return values | {"loss": values["loss"] * (float("nan") if step in self.bad else 1.0)}

    class Once(Broken):
        bad = (3,)

    run = train(replace(RECIPE, build=lambda corpus: Once()), tmp_path, tmp_path / "a", until=6)
    assert run.skipped == 1 and all(p.isfinite().all() for p in run.params)
    last = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()][-1]
    assert last["skipped"] == 1 and last["samples"] == 96 and last["loss"] == pytest.approx(last["loss"])

    class Always(Broken):
        bad = range(1000)

    with pytest.raises(InputError, match=f"no finite gradient in {HOPELESS} steps"):
        train(replace(RECIPE, steps=200, build=lambda corpus: Always()), tmp_path, tmp_path / "b")


def test_one_batch_again_and_again_is_learnt_by_heart(tmp_path: Path) -> None:
    run = train(replace(RECIPE, steps=400, lr=3e-2, same_batch=True, schedule="constant"), tmp_path, tmp_path / "a")
    first = Toy().step(0, generator_of(0, 0, 0))["loss"].detach()
    assert float(run._draw(0, 0)["loss"].detach()) < 1e-2 * float(first)


def test_overfit_reaches_the_builder(tmp_path: Path) -> None:
    train(replace(RECIPE, overfit=True), tmp_path, tmp_path / "a", until=0)
    assert (tmp_path / "overfit").exists()
    with pytest.raises(InputError, match="cannot pin its method to one clip"):
        replace(RECIPE, overfit=True, build=lambda corpus: Toy()).method(tmp_path)


@pytest.mark.parametrize("changed", [{"recompute": True}, {"compile": "eager"}])
def test_wrapped_blocks_compute_the_same(changed: dict[str, object], corpus: Path, tmp_path: Path) -> None:
    """The whole transformer, whose reference rows enter blocks by other ways than forward."""
    plain = train(recipe("personality"), corpus, tmp_path / "a", until=2)
    wrapped = train(replace(recipe("personality"), **changed), corpus, tmp_path / "b", until=2)
    _same(plain, wrapped)
    with pytest.raises(InputError, match="has no list of blocks"):
        train(replace(recipe("vae"), **changed), corpus, tmp_path / "c", until=0)


# Figures, rates, settings


def test_metrics_say_steps_samples_and_rates(tmp_path: Path) -> None:
    train(replace(RECIPE, eval_before_first_step=True), tmp_path, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert [(r["step"], r["samples"]) for r in rows if "val" not in r] == [(s, 16 * s) for s in (10, 20, 30, 40)]
    assert [r["step"] for r in rows if "val" in r] == [0, 20, 40]
    assert {"loss", "grad_norm", "lr", "skipped", "seconds_per_step"} <= rows[1].keys()
    assert (tmp_path / "a" / "validation" / "sheet-0.txt").is_file()


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(RECIPE, tmp_path, tmp_path / "a")
    board = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    losses = [(r["step"], pytest.approx(r["loss"])) for r in rows if "loss" in r]
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == losses
    assert len(board.Scalars("val/error")) == 2


def test_two_metrics_of_one_name_are_an_error(tmp_path: Path) -> None:
    assert merge({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="expected every name once, got a twice"):
        merge({"a": 1}, {"a": 2})

    class Named(Toy):
        def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            return super().step(step, generator) | {self.name: torch.zeros(())}

    for name, said in (("lr", "got lr twice"), ("grad_norm", "no grad_norm")):
        Named.name = name
        with pytest.raises(InputError, match=said):
            train(replace(RECIPE, build=lambda corpus: Named(), log_every=1), tmp_path, tmp_path / name)


def test_rates_warm_up_and_follow_the_schedule() -> None:
    def rates(**changed: object) -> list[float]:
        return [learning_rate(replace(RECIPE, **changed), s) for s in range(41)]

    cosine, constant, wsd = rates(), rates(schedule="constant"), rates(schedule="wsd", decay=0.25)
    for found in (cosine, constant, wsd):
        assert found[0] == pytest.approx(0.2) and max(found) == found[5] == pytest.approx(1.0)
    assert cosine[40] == pytest.approx(RECIPE.final_lr) == wsd[40] and constant[40] == 1
    assert wsd[30] == 1 and wsd[35] == pytest.approx((1 + RECIPE.final_lr) / 2)
    assert sorted(cosine[5:], reverse=True) == cosine[5:]


def test_settings_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    changed = RECIPE.override(["steps=7", "lr=0.5", "autocast=true", "betas=0.8,0.9", "schedule=wsd"])
    assert (changed.steps, changed.lr, changed.autocast, changed.betas) == (7, 0.5, True, (0.8, 0.9))
    for setting, said in (
        ("colour=blue", "expected KEY=VALUE with KEY one of"), ("build=x", "expected KEY=VALUE"), ("lr", "KEY=VALUE"),
        ("steps=1.5", "expected int, got '1.5'"), ("autocast=1", "expected true or false, got '1'"),
        ("betas=0.9", "expected 2 values"), ("schedule=linear", "one of cosine, constant, wsd"),
        ("log_every=0", "expected 1 or more"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            RECIPE.override([setting])
    assert main(["--recipe", "nothing", "--corpus", ".", "--out", "."]) == 2
    assert "--recipe nothing" in capsys.readouterr().err
