"""The reference's face in the solver's estimate, while a chunk is still mostly noise.

At a few flow times, what the solver believes the clean face to be is replaced by the face of the reference, and the
steps that follow start from the person: they bring in light, place and speech (after arXiv 2108.01073, which starts
from a noised guide, and arXiv 2108.02938, which replaces a part of the estimate on the way). Each generated latent
takes the reference's latent whose motion is nearest to its own. The mouth is left out: it follows the speech.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avatar_rt.config import AvatarConfig
from avatar_rt.pipeline.reference import ReferenceContext

FACE = (0.5, 0.5, 0.2, 0.29)  # of a face-centred crop, in crop sizes: middle x, y and radii of an ellipse
MOUTH = (0.5, 0.67, 0.114, 0.0855)


@dataclass(frozen=True)
class Likeness:
    """
    Attributes:
        times: Flow times; the step that reaches or crosses one goes through the reference's face.
        latents: [1, C, R, h, w] of the reference; motion: [1, R, M] of it, or None without a motion stream.
        mask: [1, 1, 1, h, w], 1 where the face is taken from the reference.
    """

    times: tuple[float, ...]
    latents: Tensor
    motion: Tensor | None
    mask: Tensor

    def applies(self, t: float, t_next: float) -> bool:
        return any(t > at >= t_next for at in self.times)

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float, motion: Tensor | None) -> Tensor:
        """The Euler step of z [1, C, T, h, w] by its velocity from ``t`` to ``t_next``, through the estimate with the
        reference's face; ``motion`` [1, T, M] is the estimate of its clean motion."""
        clean, noise = z - t * v, z + (1 - t) * v
        return torch.lerp(torch.lerp(clean, self.faces(clean, motion), self.mask), noise, t_next)

    def faces(self, clean: Tensor, motion: Tensor | None) -> Tensor:
        """The reference's latents [1, C, T, h, w] that are nearest: in motion, or in the face without such a stream."""
        if motion is not None and self.motion is not None:
            apart = torch.cdist(motion[0].float(), self.motion[0].float())
        else:
            own, theirs = ((x * self.mask)[0].transpose(0, 1).flatten(1).float() for x in (clean, self.latents))
            apart = torch.cdist(own, theirs)
        return self.latents[:, :, apart.argmin(1)]


def likeness_of(context: ReferenceContext, cfg: AvatarConfig, times: tuple[float, ...]) -> Likeness | None:
    """None where ``times`` has none. Reference and generated video are face-centred crops: their faces lie alike."""
    if not times:
        return None
    latents = context.latents[:, : cfg.dit.latent_channels]
    return Likeness(times, latents, context.motion, face_mask(*cfg.latent_size).to(latents)[None, None, None])


def face_mask(height: int, width: int) -> Tensor:
    """fp32 [height, width] over a face-centred crop in 0..1: 1 inside of the face, 0 in its mouth and outside."""
    y, x = ((torch.arange(8 * n) + 0.5) / (8 * n) for n in (height, width))

    def inside(ellipse: tuple[float, float, float, float], soft: float) -> Tensor:
        middle_x, middle_y, radius_x, radius_y = ellipse
        distance = ((x - middle_x) / radius_x).square() + ((y - middle_y) / radius_y).square()[:, None]
        return ((1 + soft / 2 - distance) / soft).clamp(0, 1)

    fine = inside(FACE, 0.3) * (1 - inside(MOUTH, 0.667))
    return fine.unflatten(1, (width, 8)).unflatten(0, (height, 8)).mean((1, 3))
