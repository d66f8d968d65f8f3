"""What the shipped weights do on the held-out cases: bars of the first 24, measured by ``bench.quality``."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from avatar_rt import AvatarEngine
from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.models.motion import motion_index
from avatar_rt.pipeline.reference import to_video
from bench.quality.cases import BAR_CASES, procedural, read_case
from bench.quality.clip import Case, Clip
from bench.quality.degraded import fitted, through_vae
from bench.quality.embedders import DlibEmbedder, available
from bench.quality.generate import generate, own_pixels
from bench.quality.identity import who

FRAMES = 77  # of each case: 3 s
LOOKED_AT = 8  # of them, for the face


@dataclass(frozen=True)
class Scores:
    """Over the cases: means, but for what is named otherwise; correlations are of mouth opening with the truth."""

    cases: int
    vae_psnr_db: float
    retrieval_top1: float
    retrieval_top1_truth: float
    mouth_r_own: float
    mouth_r_other: float
    mouth_r_truth: float
    energy_ratio_median: float
    energy_ratio_min: float
    still_frames: int


def energy(frames: np.ndarray) -> float:
    """Mean absolute difference between neighbouring frames, in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    n = min(len(a), len(b))
    a, b = a[:n] - a[:n].mean(), b[:n] - b[:n].mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else 0.0


@torch.inference_mode()
def mouth_opening(engine: AvatarEngine, frames: np.ndarray) -> np.ndarray:
    """jawOpen as the motion encoder reads it off each face-centred frame, [F]."""
    size = engine.motion.cfg.size
    pictures = to_video(frames)[0].transpose(0, 1)
    pictures = torch.nn.functional.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return engine.motion(pictures)[:, motion_index("jawOpen")].double().numpy()


def cut(case: Case) -> Case:
    """The case with FRAMES frames of target and speech."""
    assert case.target is not None
    target = Clip(case.target.frames[:FRAMES], case.target.sound)
    return Case(
        case.name, case.kind, case.identity, case.reference, case.speech[: FRAMES * SAMPLES_PER_FRAME], case.scene,
        target, {"mouth": case.truth["mouth"][:FRAMES]},
    )  # fmt: skip


def bar_cases(first: int = 0, step: int = 1) -> Iterator[Case]:
    return (cut(read_case(p, seconds=4)) for p in procedural()[first:BAR_CASES:step])


def made(first: int, step: int) -> list[np.ndarray]:
    """The videos of every ``step``-th case, in the engine's own pixels; on one core, for the others do the rest."""
    torch.set_num_threads(1)
    engine = AvatarEngine()
    return [
        own_pixels(engine, generate(engine, case, seed=first + step * i).frames)
        for i, case in enumerate(bar_cases(first, step))
    ]


@pytest.fixture(scope="module")
def scores() -> Scores:
    if (reason := available()) is not None:
        pytest.skip(reason)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        even, odd = pool.map(made, (0, 1), (2, 2))
    videos = [v for pair in zip(even, odd, strict=True) for v in pair]
    engine, embedder, cases = AvatarEngine(), DlibEmbedder(), list(bar_cases())

    references = np.stack([who(c.reference.frames, embedder, LOOKED_AT) for c in cases])

    def top1(clips: list[np.ndarray]) -> float:
        return float(
            np.mean([int(np.argmax(references @ who(v, embedder, LOOKED_AT))) == i for i, v in enumerate(clips)])
        )

    targets = [c.target.frames for c in cases if c.target is not None]
    opening = [mouth_opening(engine, v) for v in videos]
    n = len(cases)
    grid = np.array([[correlation(opening[i], c.truth["mouth"]) for c in cases] for i in range(n)])
    read = [correlation(mouth_opening(engine, t), c.truth["mouth"]) for t, c in zip(targets, cases, strict=True)]
    kept = [through_vae(engine, t) for t in targets]
    ratios = [energy(v) / energy(fitted(engine, t)) for v, t in zip(videos, targets, strict=True)]
    return Scores(
        cases=n,
        vae_psnr_db=float(np.mean([psnr for _, psnr in kept])),
        retrieval_top1=top1(videos),
        retrieval_top1_truth=top1(targets),
        mouth_r_own=float(np.diag(grid).mean()),
        mouth_r_other=float(grid[~np.eye(n, dtype=bool)].mean()),
        mouth_r_truth=float(np.mean(read)),
        energy_ratio_median=float(np.median(ratios)),
        energy_ratio_min=float(np.min(ratios)),
        still_frames=sum(int((np.abs(np.diff(v.astype(np.int16), axis=0)).max((1, 2, 3)) == 0).sum()) for v in videos),
    )


def test_there_are_24_cases(scores: Scores) -> None:
    assert scores.cases == 24


def test_vae_keeps_the_picture(scores: Scores) -> None:
    assert scores.vae_psnr_db >= 28


def test_embedding_tells_the_true_videos_apart(scores: Scores) -> None:
    assert scores.retrieval_top1_truth >= 0.9


def test_face_retrieves_its_own_reference(scores: Scores) -> None:
    assert scores.retrieval_top1 >= 0.9


def test_mouth_follows_its_own_speech(scores: Scores) -> None:
    assert scores.mouth_r_truth >= 0.7  # the reading of the mouth is to be trusted
    assert scores.mouth_r_own >= 0.6
    assert scores.mouth_r_other <= 0.15


def test_picture_moves_as_a_person_does(scores: Scores) -> None:
    assert scores.still_frames == 0
    assert 0.7 <= scores.energy_ratio_median <= 1.4
    assert scores.energy_ratio_min >= 0.4


def test_the_measures_can_fail() -> None:
    """A frozen picture has no energy, and noise does not correlate."""
    frozen = np.repeat(np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8), 9, axis=0)
    assert energy(frozen) == 0
    a, b = np.random.default_rng(1).normal(size=(2, 500))
    assert abs(correlation(a, b)) < 0.15
    assert correlation(a, a) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)
    assert correlation(a, np.zeros(500)) == 0
