"""Runs of the small encoders: ``--recipe encoders.speech`` and ``--recipe encoders.motion``."""

from __future__ import annotations

from pathlib import Path

from avatar_rt.config import preset
from training.methods.encoders import MotionMethod, SpeechMethod
from training.recipe import Recipe


def _speech(corpus: Path) -> SpeechMethod:
    from training.data.corpus import Corpus

    return SpeechMethod(preset("tiny").speech, Corpus(corpus, split="train"), Corpus(corpus, split="val"))


def _motion(corpus: Path) -> MotionMethod:
    from training.data.corpus import Corpus

    return MotionMethod(preset("tiny").motion, Corpus(corpus, split="train"), Corpus(corpus, split="val"))


def speech() -> Recipe:
    """Speech encoder: about eight minutes on one thread."""
    return Recipe("encoders.speech", _speech, steps=1500, lr=2e-3, warmup=100, weight_decay=0.05, ema=0.99)


def motion() -> Recipe:
    """Motion encoder: about ten minutes on one thread."""
    return Recipe("encoders.motion", _motion, steps=2500, lr=2e-3, warmup=100, weight_decay=0.02, ema=0.995)
