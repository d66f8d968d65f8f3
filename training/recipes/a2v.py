"""Stage 2: ``--recipe a2v --init RUN_OF_T2V``, ablations ``no_audio`` and ``scratch``, ``overfit``, ``tavr_14b``."""

from __future__ import annotations

from dataclasses import replace

from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket
from training.recipe import Recipe
from training.recipes.t2v import OVERFIT, make, make_large

STEPS = 1500
TINY = A2VSettings(
    buckets=(
        Bucket(1, people=96, cut=8, first=0.8, last=0.2), Bucket(1, people=32, first=0.1, last=0.1),
        Bucket(3, people=16, first=0.05, last=0.4), Bucket(8, people=6, first=0.05, last=0.3),
    ),
    token_shift=False, time_mean=0.4, mouth_weight=15.0, read_weight=1.0,
)  # fmt: skip
"""Mouths at first, whole chunks last, more noise, the mouth above all: a small model with little time hears so."""


def a2v() -> Recipe:
    """``tiny``: speech and a picture on top of stage 1."""
    return make("a2v", A2VMethod, TINY, STEPS)


def scratch() -> Recipe:
    """Ablation: the same stage without stage 1 before it; give it the steps of both."""
    return replace(a2v(), name="a2v.scratch")


def no_audio() -> Recipe:
    """Ablation: the same stage, deaf."""
    return make("a2v.no_audio", A2VMethod, replace(TINY, drop_audio=1.0), STEPS)


def overfit() -> Recipe:
    """One clip by heart."""
    settings = A2VSettings(**OVERFIT, next_rate=0.0, drop_audio=0.0, picture_rate=0.0)
    return make("a2v.overfit", A2VMethod, settings, 600, ema=0.9, warmup=20)


def tavr_14b() -> Recipe:
    """3.2 s of speech at 480 x 896, one window a rank."""
    buckets = (Bucket(5, people=1, first=0.4, last=0.1), Bucket(21, people=1, first=0.6, last=0.9))
    return make_large("a2v.tavr_14b", A2VMethod, A2VSettings(buckets=buckets), 50_000)
