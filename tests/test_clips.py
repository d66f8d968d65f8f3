"""Real clips and real speech, where a machine has them: each runs through, or is refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rt import AvatarEngine
from bench.clips import SOUND, VIDEO, run_clip


@pytest.fixture(scope="module")
def engine() -> AvatarEngine:
    return AvatarEngine()


def test_every_clip_runs_or_is_refused(engine: AvatarEngine, recordings: Path) -> None:
    clips = sorted(p for p in (recordings / "clips").iterdir() if p.suffix in VIDEO)
    speech = sorted(p for p in (recordings / "speech").iterdir() if p.suffix in SOUND)
    assert clips and speech
    for i, clip in enumerate(clips):
        result = run_clip(engine, clip, speech[i * len(speech) // len(clips)], 0.6, steps=1)
        if "refused" in result:
            assert clip.name in result["refused"] and "\n" not in result["refused"]
        else:
            assert result["video"].shape == (15, 256, 256, 3)
