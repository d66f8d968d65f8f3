"""Stage 1: ``--recipe t2v``. ``t2v.scratch`` is its ablation, ``t2v.overfit`` its sanity, ``t2v.tavr_14b`` its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from avatar_rt.config import AvatarConfig, preset
from training.methods.flow import Bucket, expected_tokens
from training.methods.stage import FlowMethod
from training.methods.t2v import T2VMethod, T2VSettings
from training.methods.windows import open_table
from training.recipe import Recipe, configuration

STEPS = 2000
TINY: dict[str, Any] = {
    "lr": 1e-3, "warmup": 100, "muon_lr": 1.5e-3, "ema": 0.998, "checkpoint_every": 100, "validate_every": 500,
}  # fmt: skip
"""The optimiser of ``tiny`` on a CPU core, in every stage."""
LARGE: dict[str, Any] = {
    "lr": 1e-4, "warmup": 1000, "weight_decay": 0.01, "muon_lr": 1e-4, "ema": 0.999, "checkpoint_every": 500,
    "validate_every": 1000, "sharded": True, "recompute": True, "ulysses": 8,
}  # fmt: skip
"""Settings for a model of ``tavr_14b``'s size, after published recipes of that size; nobody has run them here."""
OVERFIT: dict[str, Any] = {
    "clips": 1, "face_weight": 0.0, "mouth_weight": 0.0,
    "free_rate": 0.0, "drop_text": 0.0, "drop_all": 0.0, "buckets": (Bucket(3, people=4, windows=2),),
}  # fmt: skip


def make(
    name: str, method: Callable[[AvatarConfig, Any, Any, int], FlowMethod], settings: Any, steps: int, **optimiser: Any
) -> Recipe:
    """A run of one stage on the corpus' own configuration."""

    def build(corpus: Path) -> FlowMethod:
        cfg = configuration(corpus / "weights")
        made = method(cfg, open_table(corpus, cfg), settings, steps)
        made.show(corpus / "weights")
        return made

    return Recipe(name, build, steps=steps, **{**TINY, **optimiser})


def make_large(
    name: str, method: Callable[[AvatarConfig, Any, Any, int], FlowMethod], settings: Any, steps: int
) -> Recipe:
    """A run at ``tavr_14b``'s size: the module is built on the meta device, for the loop to shard and fill.

    It trains on a corpus that its own VAE and encoders have encoded, where there is one (``CORPUS/weights``).
    """

    def build(corpus: Path) -> FlowMethod:
        cfg = preset("tavr_14b")
        cfg = replace(cfg, dit=replace(cfg.dit, motion_dim=preset("wan_1_3b").dit.motion_dim))
        table = open_table(corpus, cfg) if (corpus / "weights").is_dir() else None
        with torch.device("meta"):
            made = method(cfg, table, settings, steps)
        if table is not None:
            made.show(corpus / "weights")
        return made

    return Recipe(name, build, steps=steps, **LARGE)


def t2v() -> Recipe:
    """``tiny``: pictures at half size, pictures, half-second windows, whole chunks, each giving way to the next."""
    return make("t2v", T2VMethod, T2VSettings(), STEPS)


def scratch() -> Recipe:
    """Ablation: whole chunks at full size from the first step, as many tokens in all as ``t2v`` sees."""
    cfg, target = preset("tiny"), T2VSettings().buckets[-1]
    people = expected_tokens(T2VSettings().buckets, cfg) / target.tokens(cfg)
    settings = T2VSettings(buckets=(replace(target, people=round(people), first=1.0, last=1.0),))
    return make("t2v.scratch", T2VMethod, settings, STEPS)


def overfit() -> Recipe:
    """One clip by heart."""
    return make("t2v.overfit", T2VMethod, T2VSettings(**OVERFIT), 600, ema=0.9, warmup=20)


def tavr_14b() -> Recipe:
    """Pictures to 3.2 s at 480 x 896, a few windows a rank."""
    buckets = (
        Bucket(1, people=8, down=2, first=0.6, last=0.1),
        Bucket(5, people=2, down=2, first=0.25, last=0.15),
        Bucket(5, people=1, first=0.1, last=0.25),
        Bucket(21, people=1, first=0.05, last=0.5),
    )
    return make_large("t2v.tavr_14b", T2VMethod, T2VSettings(buckets=buckets), 100_000)
