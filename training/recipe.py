"""What a run is: a frozen, fully typed value that a function in ``training/recipes`` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig, preset


class Method(Protocol):
    """One training stage: a module, its loss, its measure. The loop knows nothing else about it."""

    module: nn.Module

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws one batch with ``generator`` and returns scalars, ``loss`` among them."""
        ...

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Measures ``module`` on held-out data; may write pictures into ``out``."""
        ...

    def export(self, out: Path) -> None:
        """Writes the trained part as bf16 safetensors into ``out``."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A run. ``build(corpus)`` makes the method; the rest is the optimiser's and the loop's.

    Attributes:
        lr, warmup, weight_decay, betas: AdamW; the rate rises linearly over ``warmup`` steps, then falls as a cosine
            to ``lr * final_lr``.
        muon_lr: When above 0, two-dimensional weights of hidden layers train with Muon at this rate.
        conv_muon_lr: When above 0, convolution weights train with Muon at this rate.
        ema: Decay of the averaged weights that are validated and exported; 0 is off.
        clip: Largest gradient norm.
        autocast: bf16 autocast around the step (fp32 master weights).
    """

    name: str
    build: Callable[[Path], Method]
    steps: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    muon_lr: float = 0.0
    conv_muon_lr: float = 0.0
    ema: float = 0.999
    clip: float = 1.0
    autocast: bool = True
    seed: int = 0
    checkpoint_every: int = 250
    validate_every: int = 500
    threads: int = 1


def configuration(weights: Path) -> AvatarConfig:
    """What is trained: ``config.json`` beside the parts that are trained already, or the preset ``tiny``."""
    path = weights / "config.json"
    return AvatarConfig.from_json(path.read_text()) if path.exists() else preset("tiny")
