"""The reference's person in the solver's estimate, while a chunk is still mostly noise.

At a few flow times, what the solver believes the clean video to be is replaced by the person of the reference in the
scene, all but the mouth, and the steps that follow start from there: they bring in light, motion and speech (after
arXiv 2108.01073, which starts from a noised guide, and arXiv 2108.02938, which replaces a part of the estimate on the
way). Each generated latent takes the guide's latent whose motion is nearest to its own, the jaw's above all. The mouth
is left out: it follows the speech. So is, at later times, all that is lower than the nose. What is left out takes the
guide's looks all the same, lips' colour and beards: its mean over the chunk becomes the guide's, but for what changes
in the guide's mouth while it talks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, motion_index

MOUTH = (0.5, 0.67, 0.114, 0.0855)  # of a face-centred crop, in crop sizes: middle x, y and radii of an ellipse
_SOFT = 0.667  # of the ellipse's squared radius: its edge
LATE = 0.6  # the flow time below which only the upper part is the guide's
UPPER = 0.54  # of a face-centred crop's height: where the upper part ends
_EDGE = 0.06  # of the height
MOVES = 4  # of the guide's mouth that its looks are not
JAW = 6.0  # the squared difference in how far the jaw is open counts so many times more


@dataclass(frozen=True)
class Likeness:
    """
    Attributes:
        times: Flow times; the step that reaches or crosses one goes through the guide.
        latents: [1, C, R, h, w] of the guide; motion: [1, R, M] of it, or None without a motion stream.
        mask: [1, 1, 1, h, w], 1 where the estimate is the guide's; late: the same for steps that end below LATE.
        moves: [n, C h w] orthonormal, what changes most in the guide's mouth over its latents.
    """

    times: tuple[float, ...]
    latents: Tensor
    motion: Tensor | None
    mask: Tensor
    late: Tensor
    moves: Tensor

    def applies(self, t: float, t_next: float) -> bool:
        return any(t > at >= t_next for at in self.times)

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float, motion: Tensor | None) -> Tensor:
        """The Euler step of z [1, C, T, h, w] by its velocity from ``t`` to ``t_next``, through the guided estimate;
        ``motion`` [1, T, M] is the estimate of its clean motion. No latent of them is a carried one."""
        clean, noise = z - t * v, z + (1 - t) * v
        mask = self.late if t_next < LATE else self.mask
        guide = self.nearest(clean, motion)
        return torch.lerp(torch.lerp(clean + self.looks(clean, guide), guide, mask), noise, t_next)

    def looks(self, clean: Tensor, guide: Tensor) -> Tensor:
        """What the estimate's mean over time lacks of the guide's [1, C, 1, h, w], but for the mouth's moves."""
        lacking = (guide - clean).mean(2, keepdim=True)
        return lacking - (self.moves.T @ (self.moves @ lacking.flatten())).view_as(lacking)

    def nearest(self, clean: Tensor, motion: Tensor | None) -> Tensor:
        """The guide's latents [1, C, T, h, w] that are nearest: in motion, or to the estimate without such a stream."""
        if motion is not None and self.motion is not None:
            apart = torch.cdist(_weighed(motion[0]), _weighed(self.motion[0]))
        else:
            own, theirs = ((x * self.mask)[0].transpose(0, 1).flatten(1).float() for x in (clean, self.latents))
            apart = torch.cdist(own, theirs)
        return self.latents[:, :, apart.argmin(1)]


def _weighed(tokens: Tensor) -> Tensor:
    """Motion tokens [T, M] with the jaw's channel as large as it counts; tokens of other motion spaces as they are."""
    if tokens.shape[1] != FRAMES_PER_LATENT * len(MOTION_NAMES):
        return tokens.float()
    scale = torch.ones(len(MOTION_NAMES), device=tokens.device)
    scale[motion_index("jawOpen")] = (1 + JAW) ** 0.5
    return tokens.float() * scale.repeat(FRAMES_PER_LATENT)


def moves_of(latents: Tensor, mask: Tensor) -> Tensor:
    """``moves`` of Likeness: the first MOVES principal components of latents [1, C, R, h, w] over time, where ``mask``
    leaves the mouth out; as many as there are of a still or a short guide."""
    apart = ((latents - latents.mean(2, keepdim=True)) * (1 - mask))[0].transpose(0, 1).flatten(1)
    _, size, found = torch.linalg.svd(apart, full_matrices=False)
    return found[:MOVES][size[:MOVES] > 1e-4 * latents.abs().max()]


def guide_masks(height: int, width: int) -> tuple[Tensor, Tensor]:
    """``mask`` and ``late`` of Likeness, fp32 [1, 1, 1, height, width] in 0..1 over a face-centred crop."""
    middle_x, middle_y, radius_x, radius_y = MOUTH
    y, x = ((torch.arange(8 * n) + 0.5) / (8 * n) for n in (height, width))
    distance = ((x - middle_x) / radius_x).square() + ((y - middle_y) / radius_y).square()[:, None]
    outside = ((distance - 1) / _SOFT + 0.5).clamp(0, 1)
    upper = ((UPPER - y) / _EDGE + 0.5).clamp(0, 1)[:, None]
    mask, late = (
        m.unflatten(1, (width, 8)).unflatten(0, (height, 8)).mean((1, 3))[None, None, None]
        for m in (outside, outside * upper)
    )
    return mask, late
