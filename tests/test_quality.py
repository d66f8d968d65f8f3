"""What the shipped weights do on the held-out cases: the bars below, measured as ``python -m bench.cases`` does."""

from __future__ import annotations

import time

import numpy as np
import pytest

from avatar_rt import AvatarEngine
from bench.cases import CASES, Scores, correlation, energy, generate, read_case, score
from bench.embed import available


@pytest.fixture(scope="module")
def scores() -> Scores:
    if (reason := available()) is not None:
        pytest.skip(reason)
    engine = AvatarEngine()
    cases = [read_case(p) for p in sorted(CASES.glob("case-*"))]
    started = time.monotonic()
    videos = [generate(engine, case, seed=i) for i, case in enumerate(cases)]
    return score(engine, cases, videos, time.monotonic() - started)


def test_there_are_24_cases(scores: Scores) -> None:
    assert scores.cases == 24


def test_vae_keeps_the_picture(scores: Scores) -> None:
    assert scores.vae_psnr_db >= 28


def test_embedding_tells_the_true_videos_apart(scores: Scores) -> None:
    assert scores.retrieval_top1_truth >= 0.9


@pytest.mark.xfail(reason="the shipped weights are not there yet: README, 'How good is it', has the figure")
def test_face_retrieves_its_own_reference(scores: Scores) -> None:
    assert scores.retrieval_top1 >= 0.6


def test_mouth_follows_its_own_speech(scores: Scores) -> None:
    assert scores.mouth_r_truth >= 0.7  # the reading of the mouth is to be trusted
    assert scores.mouth_r_own >= 0.4
    assert scores.mouth_r_other <= 0.15


def test_picture_moves_as_a_person_does(scores: Scores) -> None:
    assert scores.still_frames == 0
    assert 0.6 <= scores.energy_ratio_median <= 1.6
    assert scores.energy_ratio_min >= 0.4


def test_the_measures_can_fail() -> None:
    """A frozen picture has no energy, and noise does not correlate."""
    frozen = np.repeat(np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8), 9, axis=0)
    assert energy(frozen) == 0
    a, b = np.random.default_rng(1).normal(size=(2, 500))
    assert abs(correlation(a, b)) < 0.15
    assert correlation(a, a) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)
    assert correlation(a, np.zeros(500)) == 0
