"""The reference's person in the solver's estimate, while a chunk is still partly noise.

At a few flow times a guide is made: the person of the reference in the place, moving as the motion stream believes by
then (``scene.performance``: heads as they go on in the reference, mouths of it that are as open as the speech wants
them). From the first of these times to the last, what the solver believes the clean video to be is replaced by the
guide, and each step starts from there; what follows is the model's (after arXiv 2108.01073, which starts from a noised
guide, and arXiv 2108.02938, which replaces the estimate on the way). The motion stream is told how the guide's head
moves: but for the mouth, its estimate becomes the guide's. What the codec loses of the guide is put back into the
pictures that are decoded (``pipeline.decode.restore``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, mouth_channels


class Performance(Protocol):
    """What shows a person moving as is wanted, see ``scene.performance``."""

    def take(self, told: Tensor, before: Tensor | None = None) -> Any:
        """From motion [T, 4, M], normalised, and that [M] of the frame before it or None, to what the two below make
        pictures of; its ``motion`` [T, 4, M] is that of the heads."""

    def pictures(self, take: Any) -> np.ndarray:
        """uint8 [1 + 4 k, H, W, 3], the last 4 T of them those that are wanted."""

    def finer(self, take: Any, count: int) -> np.ndarray | None:
        """The last ``count`` of these in a finer size, uint8 [count, n H, n W, 3]; None where there is none."""


@dataclass(frozen=True)
class Guide:
    """
    Attributes:
        latents: [1, C, T, h, w], normalised; motion: [1, T, 4 M] normalised, its head's and what was told of its mouth.
        pictures: Makes what the latents are of, uint8 [4 T, k H, k W, 3], in the finest size there is of it.
    """

    latents: Tensor
    motion: Tensor
    pictures: Callable[[], np.ndarray]

    def step(self, z: Tensor, v: Tensor, m: Tensor, vm: Tensor, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        """The Euler step of z [1, C, T, h, w] and motion m [1, T, 4 M] from ``t`` to ``t_next``, by their velocities,
        with the guide for the estimate."""
        return (torch.lerp(self.latents, z + (1 - t) * v, t_next), torch.lerp(self.motion, m + (1 - t) * vm, t_next))


@dataclass(frozen=True)
class Likeness:
    """
    Attributes:
        times: Flow times; at the step that reaches or crosses one, a guide is made anew.
        performance: Makes pictures of motion that is wanted.
        encode: Pictures uint8 [1 + 4 k, H, W, 3] to normalised latents [1, C, 1 + k, h, w].
    """

    times: tuple[float, ...]
    performance: Performance
    encode: Callable[[np.ndarray], Tensor]

    def begins(self, t: float, t_next: float) -> bool:
        """Whether a guide is to be made for the step from ``t`` to ``t_next``."""
        return any(t > at >= t_next for at in self.times)

    def leads(self, t: float) -> bool:
        """Whether the step from ``t`` goes through the last guide made."""
        return t > min(self.times)

    def guide(self, motion: Tensor, before: Tensor | None = None) -> Guide:
        """The guide for motion [1, T, 4 M] that is believed to be clean; ``before`` [1, n, 4 M] is carried, or None."""
        told = motion[0].float().cpu().unflatten(1, (FRAMES_PER_LATENT, -1))
        last = None
        if before is not None and before.shape[1]:
            last = before[0, -1].float().cpu().unflatten(0, (FRAMES_PER_LATENT, -1))[-1]
        take = self.performance.take(told, last)
        mouth = mouth_channels(motion.shape[-1]).to(motion.device)
        led = torch.where(mouth, motion, take.motion.flatten(1)[None].to(motion))
        num, count, made = len(told), FRAMES_PER_LATENT * len(told), self.performance.pictures(take)

        def finest() -> np.ndarray:
            finer = self.performance.finer(take, count)
            return made[-count:] if finer is None else finer

        return Guide(self.encode(made)[:, :, -num:], led, finest)
