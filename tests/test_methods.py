"""The stages: each runs from its recipe alone and after the one before it, and every switch does what it says."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import CFG, SmallTable, build, networks, with_text_of_the_caller

from avatar_rt.config import AvatarConfig, preset
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.weights import save_weights
from training.methods import flow
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket, draw_bucket, expected_tokens
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.methods.t2v import T2VMethod, T2VSettings
from training.methods.windows import Drawer
from training.recipe import Recipe, common
from training.recipes import a2v, personality, t2v
from training.train import train

ONE = (Bucket(3, people=2, windows=2),)
STAGES: dict[str, tuple[Any, Any]] = {
    "t2v": (T2VMethod, T2VSettings), "a2v": (A2VMethod, A2VSettings),
    "personality": (PersonalityMethod, PersonalitySettings),
}  # fmt: skip
RECIPES = (
    "t2v.t2v", "t2v.scratch", "a2v.a2v", "a2v.scratch", "a2v.no_audio", "personality.personality",
    "personality.no_reference", "personality.no_motion", "personality.no_auxiliary", "personality.same_scene",
    "personality.together",
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The recipes' own functions, on the small corpus and the small model."""
    (tmp_path / "weights").mkdir()
    save_weights(networks().vae, tmp_path / "weights" / "vae.safetensors", dtype=torch.float32)
    for module in (t2v, personality):
        monkeypatch.setattr(module, "configuration", lambda weights: CFG)
        monkeypatch.setattr(module, "open_table", lambda corpus, cfg: SmallTable(cfg))
    monkeypatch.setattr(personality, "open_networks", lambda cfg, weights: networks(cfg))
    monkeypatch.setitem(t2v.TINY, "muon_lr", 0.0)  # matrices of 32 are too small for it


def recipe(name: str, steps: int, **changed: Any) -> Recipe:
    """A recipe by name, for a few steps of at most four windows."""
    module, _, function = name.partition(".")
    made = getattr(importlib.import_module(f"training.recipes.{module}"), function)()

    def build_small(corpus: Path) -> Any:
        method = made.build(corpus)
        # The same kinds of buckets, of fewer people and of no more latents than the small clips hold.
        few = tuple(
            replace(b, people=2, windows=min(b.windows, 2), frames=min(b.frames, 4), cut=min(b.cut, 2))
            for b in method.settings.buckets
        )
        method.settings = replace(method.settings, buckets=few)
        return method

    return replace(made, build=build_small, steps=steps, warmup=2, checkpoint_every=3, validate_every=50, **changed)


def settings_of(made: Recipe) -> dict[str, Any]:
    """The settings that a recipe's method is built with."""
    cells = [c.cell_contents for c in made.build.__closure__ or ()]
    return dataclasses.asdict(next(c for c in cells if dataclasses.is_dataclass(c)))


# ---- every stage runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_alone(name: str, small: None, tmp_path: Path) -> None:
    run = train(recipe(name, 4), tmp_path, tmp_path / "run")
    assert run.step == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(list(line.get("val", line).values()))).all() for line in lines)
    exported = AvatarConfig.from_json((tmp_path / "run" / "config.json").read_text())
    assert exported == run.method.cfg
    assert (tmp_path / "run" / "dit.safetensors").is_file() and (tmp_path / "run" / "text.safetensors").is_file()
    assert (tmp_path / "run" / "validation" / "video-000004.png").is_file()


def test_stages_follow_each_other(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint and from an export; what the earlier stage knew is what the later one starts with."""
    runs = [train(recipe("t2v.t2v", 3), tmp_path, tmp_path / "t2v")]
    runs.append(train(recipe("a2v.a2v", 0), tmp_path, tmp_path / "a2v", init=tmp_path / "t2v"))
    train(recipe("personality.personality", 2), tmp_path, tmp_path / "p", init=tmp_path / "a2v")
    assert capsys.readouterr().out.count("tensors that this stage adds") == 2
    with runs[0].averaged():
        before = {k: v.clone() for k, v in runs[0].method.module.state_dict().items()}
    after = runs[1].method.module.state_dict()
    assert before.keys() < after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_stage_refuses_weights_that_are_no_earlier_stage() -> None:
    first, third = build(T2VMethod, T2VSettings()), build(PersonalityMethod, PersonalitySettings())
    state = first.module.state_dict()
    with pytest.raises(ArtifactError, match=r"run: expected the weights of this stage \(anchor, audio.*lacks 1 tens"):
        third.adopt({k: v for k, v in state.items() if k != "dit.blocks.0.ffn.0.weight"}, "run")
    with pytest.raises(ArtifactError, match=r"text and video.*has \d+ tensors: dit.anchor_embedding"):
        first.adopt(third.module.state_dict(), "run")
    with pytest.raises(ArtifactError, match=r"has other shapes for 1 tensors: dit\.head\.head\.bias"):
        third.adopt({**state, "dit.head.head.bias": torch.zeros(3)}, "run")


def test_resumed_stage_is_bit_equal(small: None, tmp_path: Path) -> None:
    """4 steps, and 2 + 2 of a run that was cut off, end in the same bits: nothing random lies outside the loop's."""
    for name in ("t2v.t2v", "a2v.a2v", "personality.personality"):
        straight = train(recipe(name, 6), tmp_path, tmp_path / name / "a")
        cut = recipe(name, 6)
        inner = cut.build

        def broken(corpus: Path, inner: Any = inner) -> Any:
            method = inner(corpus)
            step = method.step

            def stop(at: int, g: torch.Generator) -> Any:
                if at == 4:
                    raise KeyboardInterrupt
                return step(at, g)

            method.step = stop
            return method

        with pytest.raises(KeyboardInterrupt):
            train(replace(cut, build=broken), tmp_path, tmp_path / name / "b")
        resumed = train(cut, tmp_path, tmp_path / name / "b", resume=True)
        again = resumed.method.module.state_dict()
        assert all(torch.equal(v, again[k]) for k, v in straight.method.module.state_dict().items()), name


def test_a_clip_can_be_learnt_by_heart(small: None, tmp_path: Path) -> None:
    """The overfit recipe of each stage, one after another, on a clip of noise: a few per cent of the error are left."""
    init = None
    for name, steps in (("t2v", 400), ("a2v", 60), ("personality", 200)):
        made = importlib.import_module(f"training.recipes.{name}").overfit()
        made = replace(made, steps=steps, lr=8e-3, autocast=False, validate_every=1000, final_lr=0.01)
        with torch.no_grad():
            untrained = made.build(tmp_path).validate(0, tmp_path)
        run = train(made, tmp_path, tmp_path / name, init=init)
        with run.averaged(), torch.no_grad():
            trained = run.method.validate(0, tmp_path)
        assert trained["flow@0.6"] < 0.05 * untrained["flow@0.6"], (name, trained, untrained)
        assert trained["flow@0.9"] < 0.1 * untrained["flow@0.9"], (name, trained, untrained)
        init = tmp_path / name


def test_large_recipes_build_on_meta(tmp_path: Path) -> None:
    grown = 0
    for module in (t2v, a2v, personality):
        made = module.tavr_14b()
        method = made.build(Path("nowhere"))
        params = list(method.module.parameters())
        assert all(p.is_meta for p in params)
        assert sum(p.numel() for p in params) > max(grown, 13e9)
        grown = sum(p.numel() for p in params)
        assert max(b.frames for b in method.settings.buckets) == 21
        with pytest.raises(InputError, match="built without a corpus"):
            method.step(0, torch.Generator())
    with pytest.raises(InputError, match="expected a corpus that was encoded for it"):
        train(made, Path("nowhere"), tmp_path)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_windows_are_where_they_say(small: None) -> None:
    table, g = SmallTable(), torch.Generator().manual_seed(0)
    drawer = Drawer(table, CFG, reference_lengths=(2, 5))
    for kind in ("first", "free", "next"):
        b = drawer(table.train, g, Bucket(3, people=4, windows=2), kind)
        frames = b.x.shape[2]
        for i, (clip, start) in enumerate(zip(b.clip.tolist(), b.start.tolist())):
            assert torch.equal(b.x[i], table.latents[clip, start : start + frames].float().transpose(0, 1))
            assert torch.equal(b.motion[i], table.motion[clip, start : start + frames])
            sound = table.speech[clip, max(4 * start - 3, 0) : 4 * (start + frames) - 3].float()
            assert torch.equal(b.audio[i], sound) and (start == 0) == (kind == "first")
        assert b.given.sum(1).tolist() == [1 if kind == "next" else 0] * len(b.x)
        assert b.windows == 2 and torch.equal(b.clip[::2], b.clip[1::2])
        assert b.ref.tolist() == [c ^ 1 for c in b.clip[::2].tolist()]  # another clip: other words, another place
        assert b.ref_audio.shape[1] == 4 * b.ref_latents.shape[2]
    assert drawer(table.train, g, Bucket(1, people=2), "next").x.shape[2] == 2  # the carried latent and one more


def test_the_picture_of_the_person_is_of_another_moment() -> None:
    method = build(A2VMethod, A2VSettings(buckets=ONE, picture_rate=1.0, picture_gap=2))
    table, g, found = method.table, torch.Generator().manual_seed(0), 0
    for kind in ("first", "free", "next") * 4:
        b = method.draw(table.train, g, Bucket(3, people=4), kind)
        for i, (clip, start) in enumerate(zip(b.clip.tolist(), b.start.tolist())):
            same = (table.latents[clip].float() == b.anchor[i, :4, 0]).flatten(1).all(1).nonzero().flatten().tolist()
            if kind == "next":
                assert same == [0]  # what the engine gives: the clip's first latent
            elif same:
                (at,) = same
                assert at < start - 2 or at >= start + 3 + 2
                found += 1
    assert found > 20


def test_the_same_scene_is_the_ablation_of_another_scene() -> None:
    table, g = SmallTable(), torch.Generator().manual_seed(0)
    drawer = Drawer(table, CFG, reference_lengths=(3,), same_scene=True)
    b = drawer(table.train, g, Bucket(3, people=4), "free")
    assert torch.equal(b.ref, b.clip)
    for i, (clip, start) in enumerate(zip(b.clip.tolist(), b.start.tolist())):
        for r in range(3):
            where = (table.latents[clip].float() == b.ref_latents[i, :4, r]).flatten(1).all(1).nonzero().item()
            assert not start <= where < start + 3


def test_smaller_windows_keep_spread_masks_and_tokens() -> None:
    table = SmallTable()
    b = Drawer(table, CFG)(table.train, torch.Generator().manual_seed(0), Bucket(3, people=6, down=2), "free")
    assert b.x.shape[-2:] == (2, 2) and b.weight.shape[-2:] == (2, 2) and b.ref_latents.shape[-2:] == (2, 2)
    assert float(b.x.std()) == pytest.approx(1, abs=0.2) and float(b.ref_latents[:, 4].min()) == 1
    assert Bucket(3, people=6, down=2).tokens(CFG) == 3


def test_buckets_go_from_small_to_large_and_budgets_agree() -> None:
    buckets, g = T2VSettings().buckets, torch.Generator().manual_seed(0)
    early, late = ([draw_bucket(buckets, done, g).frames for _ in range(300)] for done in (0.0, 1.0))
    assert sum(f == 8 for f in early) < 40 < 100 < sum(f == 8 for f in late)
    assert min(late) == 1  # small windows never stop coming, or they would be forgotten
    cfg = preset("tiny")
    direct = settings_of(t2v.scratch())["buckets"]
    tokens = expected_tokens(tuple(Bucket(**b) for b in direct), cfg)
    assert tokens / expected_tokens(buckets, cfg) == pytest.approx(1, abs=0.12) and [b["frames"] for b in direct] == [8]


def test_conditions_are_dropped_independently_and_together() -> None:
    g = torch.Generator().manual_seed(0)
    keep = flow.kept(20_000, {"a": 0.1, "b": 0.3, "c": 0.5}, 0.0, g, g)
    rates = {k: float((~v).float().mean()) for k, v in keep.items()}
    assert rates == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.5}, abs=0.01)
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        both = float((~keep[x] & ~keep[y]).float().mean())
        assert both == pytest.approx(rates[x] * rates[y], abs=0.01)
    gone = [flow.kept(3, {"a": 0.0, "m": 0.0}, 0.2, g, common(s), apart=("m",)) for s in range(2000)]
    assert sum(bool((~k["a"]).all()) for k in gone) / 2000 == pytest.approx(0.2, abs=0.03)
    assert all(k["m"].all() and k["a"].all() == k["a"].any() for k in gone)
    refs = [flow.kept(3, {"r": 0.3}, 0.0, g, common(s), at_once=("r",))["r"] for s in range(2000)]
    assert all(r.all() == r.any() for r in refs) and sum(bool(r[0]) for r in refs) / 2000 == pytest.approx(
        0.7, abs=0.03
    )


def test_batches_of_a_step_have_their_sizes_in_common() -> None:
    """Two ranks draw other people from other generators; what they compute has one shape, and one set of conditions."""
    shapes, whether = [], []
    for rank in range(2):
        method = build(PersonalityMethod, PersonalitySettings(reference_lengths=(2, 3), drop_reference=0.5))
        method.settings = replace(method.settings, buckets=(Bucket(1, people=2, windows=2), Bucket(3, people=2)))
        told, g = Told(method.module["dit"]), torch.Generator().manual_seed(rank)
        batches = [method.batch(step, g)[0] for step in range(12)]
        shapes.append([(tuple(b.x.shape), tuple(b.ref_latents.shape)) for b in batches])
        whether.append([])
        for step in range(12):
            method.step(step, g)
            whether[-1].append("ref_k" in told.calls[-1])
    assert shapes[0] == shapes[1] and len(set(shapes[0])) > 2
    assert whether[0] == whether[1] and len(set(whether[0])) == 2


# ---- what is told ----------------------------------------------------------------------------------------------------


class Told:
    """What the transformer was given, call by call."""

    def __init__(self, dit: VideoRefDiT) -> None:
        self.calls: list[dict[str, Any]] = []
        self.texts: list[torch.Tensor] = []
        self.encoded: list[int] = []
        forward, encode = dit.forward, dit.encode_reference

        def spy(latents: Any, t: Any, text: Any, audio: Any = None, **kw: Any) -> Any:
            self.calls.append({"latents": latents, "t": t, "audio": audio, **kw})
            self.texts.append(text)
            return forward(latents, t, text, audio, **kw)

        def spy_encode(latents: Any, *a: Any, **k: Any) -> Any:
            self.encoded.append(len(latents))
            return encode(latents, *a, **k)

        dit.forward, dit.encode_reference = spy, spy_encode  # type: ignore[method-assign]


def _step(stage: str, bucket: Bucket = ONE[0], **settings: Any) -> tuple[Any, dict[str, Any], dict[str, Any], Told]:
    """Method, what it told the transformer, the losses, and the spy, of one step of a stage."""
    method_, settings_ = STAGES[stage]
    method = build(method_, settings_(buckets=(bucket,), drop_all=0.0, **settings))
    told = Told(method.module["dit"])
    values = method.step(0, torch.Generator().manual_seed(3))
    return method, told.calls[0], values, told


def test_a_reference_is_encoded_once_for_all_windows_of_its_person() -> None:
    _, call, _, told = _step("personality", Bucket(3, people=2, windows=3), drop_reference=0.0)
    assert told.encoded == [2] and call["ref_k"].shape[1] == 6
    k = call["ref_k"]
    assert torch.equal(k[:, 0], k[:, 2]) and not torch.equal(k[:, 0], k[:, 3])


def test_switches_of_conditions() -> None:
    method, call, _, told = _step("personality", drop_reference=1.0)
    assert "ref_k" not in call and not told.encoded and "wrong_ref" not in method.wrong()
    _, call, _, _ = _step("personality", drop_reference=0.0)
    assert call["ref_k"] is not None
    method, call, values, _ = _step("personality", adds=("anchor", "audio", "reference"), drop_reference=0.0)
    assert "motion" not in call and "motion" not in values and not hasattr(method.module["dit"], "motion_head")
    method, call, _, _ = _step("a2v", drop_audio=1.0)
    null = method.module["dit"].null_audio
    assert torch.equal(call["audio"], null.expand_as(call["audio"])) and "wrong_audio" not in method.wrong()
    _, call, _, _ = _step("a2v", drop_audio=0.0)
    assert float(call["audio"].detach().abs().min(2).values.max()) > 0
    for drop in (0.0, 1.0):
        _, _, _, told = _step("t2v", drop_text=drop)
        assert bool((told.texts[0] == 0).all()) == (drop == 1.0)


def test_the_mouth_reader_stays_in_training(small: None, tmp_path: Path) -> None:
    """It is not exported; a later stage takes a checkpoint that holds it, and an earlier one's weights lack it."""
    train(recipe("t2v.t2v", 1), tmp_path, tmp_path / "t2v")
    run = train(recipe("a2v.a2v", 3), tmp_path, tmp_path / "a2v", init=tmp_path / "t2v")
    assert "mouth_reader" in run.method.module and not (tmp_path / "a2v" / "mouth_reader.safetensors").exists()
    later = train(recipe("personality.personality", 1), tmp_path, tmp_path / "p", init=tmp_path / "a2v")
    assert "mouth_reader" not in later.method.module


def test_t2v_shows_the_first_latent_of_some() -> None:
    for rate, shown in ((0.0, 0), (1.0, 4)):
        method, call, _, _ = _step("t2v", p_i2v=rate)
        assert int((call["t"][:, 0] == 0).sum()) == shown and not (call["t"][:, 1:] == 0).any()
        assert int(call["latents"][:, 5, 0, 0, 0].sum()) == shown  # the carried-over mask says so
        assert "audio_embedding" not in dict(method.module["dit"].named_children())
    b = method.draw(method.table.train, torch.Generator(), Bucket(1, people=4), "free")
    assert not b.given.any()  # a picture that is given leaves nothing to learn


def test_motion_is_dropped_shuffled_and_then_not_asked_for() -> None:
    base = {"drop_reference": 1.0, "drop_audio": 0.0, "free_rate": 1.0, "next_rate": 0.0}
    _, call, values, _ = _step("personality", drop_motion=1.0, shuffle_motion=0.0, **base)
    assert not call["motion"].any() and float(values["motion"]) == 0.0
    _, own, values, _ = _step("personality", drop_motion=0.0, shuffle_motion=0.0, **base)
    assert float(values["motion"]) > 0
    _, other, values, _ = _step("personality", drop_motion=0.0, shuffle_motion=1.0, **base)
    assert float(values["motion"]) == 0.0
    t = own["t"][:, :, None]
    method = build(PersonalityMethod, PersonalitySettings(buckets=ONE, free_rate=1.0, next_rate=0.0))
    b, _ = method.batch(0, torch.Generator().manual_seed(3))
    # Another person's motion at the window's own times and with its own noise: only the clean part differs.
    torch.testing.assert_close(other["motion"] - own["motion"], (1 - t) * (b.motion.roll(2, 0) - b.motion))


def test_text_of_the_caller_takes_the_place_of_a_text_encoder() -> None:
    cfg = with_text_of_the_caller()
    method = build(T2VMethod, T2VSettings(buckets=ONE, drop_text=0.0, drop_all=0.0), cfg=cfg)
    assert set(dict(method.module.named_children())) == {"dit"}
    told = Told(method.module["dit"])
    method.step(0, torch.Generator().manual_seed(0))
    assert any(torch.equal(told.texts[0][0], row) for row in method.table.text)


def test_recipes_differ_by_their_switch_alone() -> None:
    """An ablation's settings are the stage's own, but for the field that names it."""
    full = settings_of(personality.personality())
    for name, field in (("no_reference", "drop_reference"), ("no_motion", "adds"), ("no_auxiliary", "terms"),
                        ("same_scene", "same_scene")):  # fmt: skip
        other = settings_of(getattr(personality, name)())
        assert {k for k in full if full[k] != other[k]} == {field}
    audio = settings_of(a2v.a2v())
    assert {k for k in audio if audio[k] != settings_of(a2v.no_audio())[k]} == {"drop_audio"}
    assert settings_of(a2v.scratch()) == audio
