"""The identity network of the losses: ``--recipe identity``."""

from __future__ import annotations

from pathlib import Path

from training.methods.identity import IdentityMethod
from training.recipe import Recipe


def _build(corpus: Path) -> IdentityMethod:
    from training.data.corpus import Corpus

    return IdentityMethod(Corpus(corpus, split="train"), Corpus(corpus, split="val"))


def identity() -> Recipe:
    """Ten minutes on one CPU core."""
    return Recipe("identity", _build, steps=1000, lr=2e-3, warmup=100, final_lr=0.0, weight_decay=0.02, ema=0.99,
                  validate_every=250, device="cpu")  # fmt: skip
