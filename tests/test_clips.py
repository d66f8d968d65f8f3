"""Real clips and real speech, where a machine has them: each runs through, or is refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avatar_rt import AvatarEngine, InputError
from avatar_rt.config import FPS, SAMPLES_PER_FRAME
from bench.quality.cases import MANIFEST, read_halves, read_manifest, real_sources
from bench.quality.clip import Case
from bench.quality.embedders import DlibEmbedder, available
from bench.quality.faces import find_faces
from bench.quality.generate import generate
from bench.quality.identity import BARS, embed, separation

FRAMES = 15  # of speech


def test_every_clip_runs_or_is_refused(recordings: Path) -> None:
    engine = AvatarEngine()
    sources = real_sources(MANIFEST, recordings / "clips", recordings / "speech")
    assert len(sources) == 19
    side = engine.config.height * engine.config.output_scale
    for source in sources:
        try:
            case = source.read()
            short = Case(
                case.name,
                case.kind,
                case.identity,
                case.reference,
                case.speech[: FRAMES * SAMPLES_PER_FRAME],
                case.scene,
            )
            video = generate(engine, short, steps=1)
        except InputError as e:
            assert source.clip is not None and source.clip.file in str(e) and "\n" not in str(e)
        else:
            assert video.frames.shape == (FRAMES, side, side, 3)


def test_embedding_tells_real_people_apart(recordings: Path) -> None:
    """Two stretches of each clip, four frames of each: the command of bench.quality.identity takes twelve."""
    if (reason := available()) is not None:
        pytest.skip(reason)
    embedder, rows = DlibEmbedder(), read_manifest()
    parts: tuple[list, list] = ([], [])
    for row in rows:
        for part, frames in zip(parts, read_halves(recordings / "clips", row), strict=True):
            some = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
            part.append(embed(some, find_faces(some, 4 * FPS / len(frames)), embedder))
    assert separation(*parts, [row.identity for row in rows])["auc"] >= BARS["real"]
