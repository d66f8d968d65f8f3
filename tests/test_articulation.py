"""How a reference's mouth answers its own sound: in whose measure, how late, and when nothing of it is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avatar_rt import AvatarEngine
from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.media.audio import read_audio
from avatar_rt.scene.articulation import LATEST, Articulation, articulation

FRAMES = 2000


@pytest.fixture(scope="module")
def engine() -> AvatarEngine:
    return AvatarEngine()


def _speech(frames: int, seed: int = 0) -> torch.Tensor:
    """A jaw that moves as fast as one does: mean -0.5, spread 0.6."""
    noise = torch.randn(frames + 4, generator=torch.Generator().manual_seed(seed))
    moving = noise.unfold(0, 5, 1).mean(1)
    return 0.6 * (moving - moving.mean()) / moving.std(correction=0) - 0.5


def test_a_jaw_is_looked_for_as_it_is_read() -> None:
    heard = _speech(FRAMES)
    found = articulation(1.7 + 0.5 * heard, heard)
    wanted = found.level + found.gain * heard
    assert float(wanted.mean()) == pytest.approx(1.7 - 0.25, abs=0.02)
    assert float(wanted.std()) == pytest.approx(0.3, rel=0.05)
    assert found.late == 0


@pytest.mark.parametrize("late", range(LATEST + 1))
def test_a_mouth_that_comes_later_is_found_so_much_later(late: int) -> None:
    heard = _speech(FRAMES)
    assert articulation(heard.roll(late), heard).late == late
    assert articulation(heard.roll(-late), heard).late == 0  # ahead of the usual: the model's own is left


def test_what_has_nothing_to_do_with_the_sound_is_as_without_sound() -> None:
    read, other = _speech(FRAMES), _speech(FRAMES, 1)
    assert articulation(read, other) == articulation(read)
    assert articulation(read, torch.zeros(FRAMES)) == articulation(read)
    silent = articulation(read)
    assert silent.late == 0 and silent.gain > 0


def test_a_short_reference_counts_for_less() -> None:
    """Its mean and spread lie between a usual speaker's and its own."""
    heard = _speech(24)
    level = float(heard.mean() - heard.std(correction=0) / 0.6 * -0.5)  # of one that is believed altogether
    short, usual = articulation(heard, heard), articulation(heard)
    assert min(usual.level, level) < short.level < max(usual.level, level)
    assert articulation(heard[:4], heard[:4]) == articulation(heard[:4])  # too short to say anything of it


def test_a_still_face_wants_its_own_mouth() -> None:
    assert articulation(torch.full((50,), 0.3)) == Articulation(pytest.approx(0.3), 0.0)


def test_a_late_mouth_hears_the_sound_so_much_later(
    engine: AvatarEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames are, to the bit, those of the same sound after so much silence."""
    wave = read_audio(root / "avatar_rt/samples/speech.wav").samples[: 40 * SAMPLES_PER_FRAME]
    reference = engine.prepare(root / "avatar_rt/samples/reference.mp4")
    own = engine.articulation(reference)

    def frames(late: int, sound: np.ndarray) -> np.ndarray:
        monkeypatch.setattr(AvatarEngine, "articulation", lambda *_: Articulation(own.level, own.gain, late))
        session = engine.session(reference, seed=3)
        session.push_audio(sound)
        session.end_audio()
        return np.concatenate(list(session.frames()))

    after_silence = np.concatenate([np.zeros(2 * SAMPLES_PER_FRAME, np.float32), wave])
    late, at_once = frames(2, wave), frames(0, wave)
    assert len(late) == len(at_once) == 40
    assert np.array_equal(late, frames(0, after_silence)[:40])
    assert not np.array_equal(late, at_once)
