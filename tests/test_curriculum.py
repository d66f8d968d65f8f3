"""The curriculum's program: what runs after what, nothing twice, unfinished models generate, and an honest page."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stages import CFG, SmallTable, networks

from avatar_rt.config import MOTION_CHANNELS, SamplingConfig
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import InputError
from avatar_rt.models.weights import save_weights
from bench import curriculum, curriculum_page
from bench.curriculum import LEGS, chosen, main, read_metrics, steps_of
from bench.quality.cases import CASES, Source, read_case
from bench.quality.generate import generate as generate_video
from bench.quality.partial import Sees, generate, passes
from training.recipes import a2v, personality, t2v
from training.train import train


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus folder with the small encoders, and the recipes' functions on the small table."""
    for module in (t2v, personality):
        monkeypatch.setattr(module, "configuration", lambda weights: CFG)
        monkeypatch.setattr(module, "open_table", lambda corpus, cfg: SmallTable(cfg))
    monkeypatch.setattr(personality, "open_networks", lambda cfg, weights: networks(cfg))
    weights = tmp_path / "corpus" / "weights"
    for name, part in vars(networks()).items():
        if name != "identity":
            save_weights(part, weights / f"{name}.safetensors")
    return tmp_path / "corpus"


def in_process(commands: list[list[str]]) -> Any:
    """Stands in for the training command: the recipe's own run, in this process, of small windows."""

    def run(command: list[str]) -> None:
        commands.append(command)
        words = [w for w in command if w != "--resume"]
        given = dict(zip(words[::2], words[1::2]))
        module, _, function = given["--recipe"].partition(".")
        made = getattr(importlib.import_module(f"training.recipes.{module}"), function)()

        def small(path: Path) -> Any:
            method = made.build(path)
            few = tuple(
                replace(b, people=2, windows=1, frames=min(b.frames, 4), cut=min(b.cut, 2))
                for b in method.settings.buckets
            )
            method.settings = replace(method.settings, buckets=few)
            return method

        steps = int(given["--set"].partition("=")[2])
        run_ = replace(made, build=small, steps=steps, warmup=1, checkpoint_every=100, validate_every=100, muon_lr=0.0)
        init = Path(given["--init"]) if "--init" in given else None
        train(run_, Path(given["--corpus"]), Path(given["--out"]), resume=True, init=init)

    return run


def test_every_leg_is_a_recipe_and_comes_after_the_one_it_needs() -> None:
    seen: set[str] = set()
    for leg in LEGS:
        module, _, function = leg.recipe.partition(".")
        if leg.shipped or leg.of in seen:
            assert leg.after is None
        else:
            assert callable(getattr(importlib.import_module(f"training.recipes.{module}"), function))
        assert leg.after is None or leg.after in seen
        seen.add(leg.name)
    assert {c.of for c in curriculum_page.CLAIMS} | {c.beside for c in curriculum_page.CLAIMS if c.beside} <= seen
    assert [leg.name for leg in chosen("a2v,t2v")] == ["t2v", "a2v"]
    with pytest.raises(InputError, match=r"expected some of t2v, .*, got magic"):
        chosen("magic")


def test_guidance_leaves_out_what_is_not_known() -> None:
    s = SamplingConfig(reference_scale=3.0, audio_scale=2.5, text_scale=4.0)
    for sees in (
        Sees(),
        Sees(reference=False),
        Sees(audio=False),
        Sees(False, False),
        Sees(False, False, caption=True),
    ):
        found = passes(s, sees)
        assert sum(p.weight for p in found) == pytest.approx(1)
        assert sum(p.motion_weight for p in found) == pytest.approx(1)
        assert not any((p.reference and not sees.reference) or (p.audio and not sees.audio) for p in found)
        assert len({(p.reference, p.audio, p.text) for p in found}) == len(found)
    (only,) = passes(s, Sees(False, False))
    assert only.weight == 1
    deaf = {(p.reference, p.audio): p.weight for p in passes(s, Sees(reference=False))}
    assert deaf == pytest.approx({(False, False): -1.5, (False, True): 2.5})


def test_the_whole_program_on_small_models(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages and an ablation: trained once, each case generated once, scored, stored and tabulated."""
    monkeypatch.setattr(curriculum, "RESULTS", tmp_path)
    monkeypatch.setattr(curriculum, "ROOT", tmp_path)
    monkeypatch.setattr(curriculum, "SWEPT", ())
    (tmp_path / "docs").mkdir()
    commands: list[list[str]] = []
    out = tmp_path / "out"
    words = ["--corpus", str(corpus), "--out", str(out), "--steps", "t2v=2", "a2v=2", "personality=2", "--legs",
             "t2v,a2v,a2v.no_audio,personality", "--count", "1", "--solver-steps", "1", "--write"]  # fmt: skip
    assert main(words, in_process(commands)) == 0
    assert [c[1] for c in commands] == ["t2v.t2v", "a2v.a2v", "a2v.no_audio", "personality.personality"]
    assert ["--init" in c for c in commands] == [False, True, True, True]
    first = (tmp_path / "docs" / "curriculum.md").read_text()
    stored = json.loads((tmp_path / "curriculum.json").read_text())
    assert set(stored["legs"]) == {"t2v", "a2v", "a2v.no_audio", "personality"}
    for name, entry in stored["legs"].items():
        assert entry["tokens"] > 0 and entry["validation"]["flow"] > 0 and entry["quality"]["cases"] == ["case-00"]
        assert (out / name / "videos" / "case-00.mp4").is_file()
        assert (out / name / "videos" / "case-00.npy").is_file() == (name == "personality")
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    assert main(words, in_process(commands)) == 0
    assert len(commands) == 4 and times == {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    assert (tmp_path / "docs" / "curriculum.md").read_text() == first and "| a2v.no_audio | 2 |" in first
    assert main([*words[:4], "--legs", "personality.no_motion", "--measure"], in_process(commands)) == 2


def test_a_model_generates_without_what_it_lacks(corpus: Path, tmp_path: Path) -> None:
    case = read_case(CASES / "case-00")
    case = dataclasses.replace(case, speech=case.speech[: 16_000 // 2])
    models = ((t2v.t2v, Sees(False, False, "none", True)), (a2v.a2v, Sees(reference=False, anchor="picture")),
              (personality.no_motion, Sees()))  # fmt: skip
    for recipe_, sees in models:
        method = recipe_().build(corpus)
        folder = tmp_path / recipe_.__name__
        folder.mkdir()
        method.export(folder)
        leg = next(leg for leg in LEGS if leg.sees == sees)
        engine = AvatarEngine(curriculum.make_bundle(leg, folder, corpus), dtype=torch.float32)
        made = generate(engine, case, sees, prompt="someone", seed=3, steps=2)
        assert made.motion is None and made.clip.frames.shape[0] == 13
        again = generate(engine, case, sees, prompt="someone", seed=3, steps=2)
        assert np.array_equal(made.clip.frames, again.clip.frames)
        if sees.caption:
            other = generate(engine, case, sees, prompt="nobody at all", seed=3, steps=2)
            assert not np.array_equal(made.clip.frames, other.clip.frames)
        louder = dataclasses.replace(case, speech=np.roll(case.speech, 5000))
        same = np.array_equal(
            generate(engine, louder, sees, prompt="someone", seed=3, steps=2).clip.frames, made.clip.frames
        )
        assert same  # an untrained model's speech adds nothing yet, and stage 1 hears nothing at all


def test_a_whole_model_generates_as_it_does_for_its_users() -> None:
    case, engine = read_case(CASES / "case-00"), AvatarEngine()
    case = dataclasses.replace(case, speech=case.speech[:8000])
    made = generate(engine, case, Sees(), seed=3, steps=2)
    assert made.motion is not None and made.motion.shape == (13, MOTION_CHANNELS)
    assert np.array_equal(made.clip.frames, generate_video(engine, case, seed=3, steps=2).frames)


def test_the_shipped_weights_are_measured_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum, "SWEPT", ())

    def never(command: list[str]) -> None:
        raise AssertionError(command)

    words = ["--corpus", str(tmp_path), "--out", str(tmp_path / "out"), "--legs", "tiny", "--count", "1",
             "--solver-steps", "1"]  # fmt: skip
    assert main(words, never) == 0
    kept = json.loads((tmp_path / "out" / "tiny" / "result.json").read_text())
    assert kept["weights"] == AvatarEngine().bundle.weights_hash and kept["quality"]["mean"]["identity"] > 0
    (tmp_path / "out" / "tiny" / "leg.json").write_text('{"weights": "others"}')
    assert main(words, never) == 2  # its videos are not those of these weights
    legs = {"tiny": kept, "t2v": _entry(0.4)}
    text = curriculum_page.page({"legs": legs, "machine": {"cpu": "a CPU", "torch": "2", "commit": "abc"}})
    assert "| t2v | 10 |" in text and "generated motion is seen" in text


def test_every_length_of_a_reference_is_held_against_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float | None] = []
    held: list[float | None] = []

    def made(leg, bundle, videos, sources, steps) -> None:
        given.append(sources[0].seconds)

    def measured(videos, bundle, sources, workers) -> dict[str, int]:
        held.append(sources[0].seconds)
        return {"n": 1}

    monkeypatch.setattr(curriculum, "make_videos", made)
    monkeypatch.setattr(curriculum, "measure", measured)
    a = argparse.Namespace(solver_steps=None, workers=1)
    found = curriculum.sweep(LEGS[-2], tmp_path, tmp_path, [Source(tmp_path)], {"n": 8}, a)
    assert given == [1, 2, 4] and held == [None] * 3
    assert found == {"1": {"n": 1}, "2": {"n": 1}, "4": {"n": 1}, "8": {"n": 8}}


def test_scratch_gets_the_tokens_of_both_stages(tmp_path: Path) -> None:
    leg = next(leg for leg in LEGS if leg.name == "a2v.scratch")
    with pytest.raises(InputError, match="expected t2v and a2v to be trained before it"):
        steps_of(leg, {"a2v": 100}, tmp_path)
    for name, tokens in (("t2v", 3000), ("a2v", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "leg.json").write_text(json.dumps({"steps": 100, "tokens": tokens}))
    assert steps_of(leg, {"a2v": 100}, tmp_path) == 400
    assert steps_of(leg, {"a2v": 100, "a2v.scratch": 7}, tmp_path) == 7


def test_metrics_are_counted_once(tmp_path: Path) -> None:
    lines = [{"step": 25, "tokens": 10.0}, {"step": 50, "tokens": 20.0}, {"step": 50, "tokens": 20.0},
             {"step": 50, "val": {"flow": 0.5}}]  # fmt: skip
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)))
    assert read_metrics(tmp_path / "m") == {"tokens": 750, "validation": {"flow": 0.5}}


def _entry(flow: float, **mean: float) -> dict[str, Any]:
    quality = {"cases": [f"case-{i:02d}" for i in range(36)], "scored": 36, "mean": mean, "loop_r": 0.8,
               "offset_within_2": mean.pop("offset_within_2", 0.1)}  # fmt: skip
    return {"steps": 10, "tokens": 5_000_000, "cpu_minutes": 3.0, "validation": {"flow": flow}, "quality": quality}


def test_the_page_says_what_is_met_and_what_is_not() -> None:
    legs = {
        "t2v": _entry(0.4), "t2v.scratch": _entry(0.5), "a2v": _entry(0.3, offset_within_2=0.9, lse_c_star=0.4),
        "a2v.no_audio": _entry(0.35, lse_c_star=0.5),
        "personality": _entry(0.2, identity_top1=0.8, style_top1=1 / 36, style_auc=0.55, identity=0.9)
        | {"seconds": {s: _entry(0.2, identity=v)["quality"] for s, v in (("1", 0.5), ("2", 0.6), ("8", 0.55))}},
    }  # fmt: skip
    text = curriculum_page.page({"legs": legs, "machine": {"cpu": "a CPU", "torch": "2", "commit": "abc"}})
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in text.splitlines() if line.startswith("| ")}
    assert rows["stage 1, small first: flow error at as many tokens"] == "yes"
    assert rows["stage 1 pays for stage 2: flow error at as many tokens"] == "not measured"
    assert rows["stage 2 hears: sound found within 2 frames"] == "yes" and rows["stage 2 hears: LSE-C*"] == "no"
    assert rows["stage 3 knows who, personality: top-1"] == "no"
    assert rows["stage 3 knows how, personality: style finds its own"] == "no"
    assert rows["stage 3 knows how, personality: others further in style"] == "no"
    assert rows["motion stream, personality: generated motion is seen"] == "yes"
    assert rows["stage 3 knows who, tiny: top-1"] == "not measured"
    assert (
        "personality, frames to all of the reference: longer references are not always better." in text
        and "36 cases; a CPU" in text
    )
    legs["personality"]["quality"]["mean"] |= {"style_top1": 8 / 36, "style_auc": 0.62}
    text = curriculum_page.page({"legs": legs, "machine": {"cpu": "a CPU", "torch": "2", "commit": "abc"}})
    assert "style finds its own | 0.222 | personality.no_reference | n/a | above chance | yes |" in text
    assert "others further in style | 0.62 | personality.no_reference | n/a | above chance | yes |" in text
