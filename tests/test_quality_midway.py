"""Sampling on from a true video with noise on it: none gives the VAE's picture, all of it the engine's own start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_bundle import write_bundle

from avatar_rt import AvatarEngine
from avatar_rt.errors import InputError
from bench.quality import midway
from bench.quality.clip import Case, Clip
from bench.quality.degraded import through_vae

FRAMES = 33  # a latent and a chunk of eight


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AvatarEngine:
    return AvatarEngine(write_bundle(tmp_path_factory.mktemp("midway") / "bundle", spread=0.2))


def case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def clip() -> Clip:
        frames = np.clip(rng.normal(127, 20, (1, 32, 32, 3)) + rng.normal(0, 8, (FRAMES, 1, 1, 3)), 0, 255)
        return Clip(frames.astype(np.uint8), (0.1 * rng.normal(size=FRAMES * 640)).astype(np.float32))

    reference, target = clip(), clip()
    assert target.sound is not None
    return Case(f"case-{seed}", "procedural", str(seed), reference, target.sound, target.frames[0], target)


def test_without_noise_it_is_the_vae_alone(engine: AvatarEngine) -> None:
    one = case(0)
    clean, noisy = midway.sampled_from(engine, one, [0.0, 0.6])
    assert one.target is not None and clean.shape == noisy.shape == (FRAMES - 1, 32, 32, 3)
    kept = through_vae(engine, one.target.frames)[0][1:]
    assert np.abs(clean.astype(int) - kept.astype(int)).max() <= 1
    assert np.abs(noisy.astype(int) - kept.astype(int)).mean() > 1


def test_with_nothing_but_noise_the_truth_does_not_matter(engine: AvatarEngine) -> None:
    """But for the latent before the chunk, with which the decoder starts."""
    one, two = case(0), case(1)
    assert one.target is not None and two.target is not None
    frames = np.concatenate([one.target.frames[:1], two.target.frames[1:]])
    other = replace(one, target=Clip(frames, one.target.sound))
    times = [0.5, 1.0]
    (half, whole), (other_half, other_whole) = (midway.sampled_from(engine, c, times) for c in (one, other))
    assert np.array_equal(whole, other_whole) and not np.array_equal(half, other_half)


def test_the_sound_is_cut_with_its_context() -> None:
    wave = np.arange(1, 4001, dtype=np.float32)
    loud = midway.normalise_loudness(wave, 16_000)
    assert np.array_equal(midway._sound(wave, 1, 3, (100, 50)), loud[540:1970])
    early, late = midway._sound(wave, 0, 1, (100, 0)), midway._sound(wave, 6, 7, (0, 10))
    assert np.array_equal(early, np.pad(loud[:640], (100, 0))) and np.array_equal(late, np.pad(loud[3840:], (0, 490)))


def test_faces_are_told_apart(engine: AvatarEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the picture's own colours for a face embedding: those of the VAE's picture are the reference's."""

    def colours(frames: np.ndarray, embedder: object) -> np.ndarray:
        small = frames.astype(np.float32).mean((0, 1, 2)) - 127
        return np.asarray(small / np.linalg.norm(small))

    monkeypatch.setattr(midway, "who", colours)
    monkeypatch.setattr(
        midway, "sampled_from", lambda engine, c, times, seed: [c.reference.frames, case(0).reference.frames]
    )
    cases = [replace(case(i), reference=Clip(np.full((9, 8, 8, 3), c, np.uint8), None))
             for i, c in enumerate(((200, 90, 90), (90, 200, 90), (90, 90, 200)))]  # fmt: skip
    rows = midway.measure(engine, cases, [0.0, 1.0], None)  # type: ignore[arg-type]
    assert rows[0] == pytest.approx({"t": 0.0, "top1": 1.0, "own": 1.0, "margin": rows[0]["margin"]})
    assert rows[0]["margin"] > 0.1 and rows[1]["top1"] == pytest.approx(1 / 3)


def test_bad_input_is_one_sentence(engine: AvatarEngine, capsys: pytest.CaptureFixture[str]) -> None:
    short = replace(case(0), target=Clip(case(0).reference.frames[:20], None))
    with pytest.raises(InputError, match="case-0: expected a true video of 33 frames"):
        midway.sampled_from(engine, short, [0.5])
    for arguments, told in ((["--times", "0.5,2"], "times: expected numbers from 0 to 1"), (["--times", "x"], "times:"),
                            (["--count", "1"], "count: expected 2 or more")):  # fmt: skip
        assert midway.main(arguments) == 2
        assert told in capsys.readouterr().err


def test_nothing_else_is_changed_by_it(engine: AvatarEngine) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again = (midway.sampled_from(engine, case(2), [0.7])[0] for _ in range(2))
    assert np.array_equal(first, again) and torch.equal(before, torch.random.get_rng_state())
