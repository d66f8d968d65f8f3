"""The identity networks of the losses: ``--recipe identity`` of pictures, ``--recipe identity.latent`` of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.methods.identity import IdentityMethod, LatentIdentityMethod
from training.methods.windows import open_table
from training.recipe import Recipe, configuration

OPTIMISER: dict[str, Any] = {
    "lr": 2e-3, "warmup": 100, "final_lr": 0.0, "weight_decay": 0.02, "ema": 0.99, "validate_every": 250,
    "device": "cpu",
}  # fmt: skip


def _build(corpus: Path) -> IdentityMethod:
    from training.data.corpus import Corpus

    return IdentityMethod(Corpus(corpus, split="train"), Corpus(corpus, split="val"))


def _latent(corpus: Path) -> LatentIdentityMethod:
    return LatentIdentityMethod(open_table(corpus, configuration(corpus / "weights")))


def identity() -> Recipe:
    """Ten minutes on one CPU core."""
    return Recipe("identity", _build, steps=1000, **OPTIMISER)


def latent() -> Recipe:
    """Of the latents of an encoded corpus: four minutes on one CPU core."""
    return Recipe("identity.latent", _latent, steps=1600, **OPTIMISER)
