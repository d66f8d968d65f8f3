"""The lip-sync scorer of bench/quality: ``--recipe sync --corpus DIR``, DIR rendered at 128 pixels."""

from __future__ import annotations

from pathlib import Path

from training.data.corpus import Corpus
from training.methods.sync import SyncMethod
from training.recipe import Recipe


def _build(path: Path) -> SyncMethod:
    """``DIR/recorded``, where it is, holds people who speak with recorded voices (training.data.recorded)."""
    folders = [path] + ([path / "recorded"] if (path / "recorded").is_dir() else [])
    return SyncMethod([Corpus(f, "train") for f in folders], [Corpus(f, "val") for f in folders],
                      odds=[1.0] * len(folders))  # fmt: skip


def sync() -> Recipe:
    """One to three steps a second on one core of an AMD EPYC. Twelve clips a step."""
    return Recipe("sync", _build, steps=1500, lr=1.5e-3, warmup=60, weight_decay=0.02, ema=0.995, final_lr=0.02,
                  device="cpu")  # fmt: skip
