"""Recipes of the first training of the whole model."""

from __future__ import annotations

from pathlib import Path

from training.methods.avatar import AvatarMethod, AvatarSettings
from training.recipe import Recipe, configuration

STEPS = 2600


def _build(corpus: Path) -> AvatarMethod:
    weights = corpus / "weights"
    return AvatarMethod(configuration(weights), corpus, weights, AvatarSettings(), STEPS)


def avatar() -> Recipe:
    """``tiny`` on two CPU cores: about an hour."""
    return Recipe(
        "avatar", _build, steps=STEPS, lr=1e-3, warmup=100, muon_lr=1.5e-3, ema=0.998,
        checkpoint_every=100, validate_every=500, threads=2,
    )  # fmt: skip
