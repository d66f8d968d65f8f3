"""Runs of the small encoders: ``--recipe encoders.speech`` and ``--recipe encoders.motion``.

On the CPU: drawing and damaging a batch costs more than the networks do.
"""

from __future__ import annotations

from pathlib import Path

from avatar_rt.config import preset
from training.data.talk import Talk
from training.methods.encoders import MotionMethod, SpeechMethod, load_recorded
from training.recipe import Recipe


def _speech(corpus: Path) -> SpeechMethod:
    talk = corpus / "talk.npz"
    recorded, recorded_val = load_recorded(corpus / "recorded")
    return SpeechMethod(preset("tiny").speech, Talk(talk, "train"), Talk(talk, "val"), recorded, recorded_val)


def _motion(corpus: Path) -> MotionMethod:
    from training.data.corpus import Corpus

    return MotionMethod(preset("tiny").motion, Corpus(corpus, split="train"), Corpus(corpus, split="val"))


def speech() -> Recipe:
    """Speech encoder, from ``talk.npz`` (training.data.talk) and ``recorded`` (training.data.align), if there."""
    return Recipe("encoders.speech", _speech, steps=4000, lr=1.5e-3, warmup=100, weight_decay=0.05, ema=0.99,
                  device="cpu")  # fmt: skip


def motion() -> Recipe:
    """Motion encoder, from the rendered corpus."""
    return Recipe("encoders.motion", _motion, steps=8000, lr=2e-3, warmup=100, weight_decay=0.02, ema=0.995,
                  device="cpu")  # fmt: skip
