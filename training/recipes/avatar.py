"""Recipes of the first training of the whole model."""

from __future__ import annotations

from pathlib import Path

from avatar_rt.config import AvatarConfig, preset
from training.methods.avatar import AvatarMethod, AvatarSettings
from training.recipe import Recipe


def _build(corpus: Path) -> AvatarMethod:
    weights = corpus / "weights"
    config = weights / "config.json"
    cfg = AvatarConfig.from_json(config.read_text()) if config.exists() else preset("tiny")
    return AvatarMethod(cfg, corpus, weights, AvatarSettings())


def avatar() -> Recipe:
    """``tiny`` on two CPU cores: about an hour."""
    return Recipe(
        "avatar", _build, steps=2600, lr=1e-3, warmup=100, muon_lr=1.5e-3, ema=0.998,
        checkpoint_every=100, validate_every=500, threads=2,
    )  # fmt: skip
