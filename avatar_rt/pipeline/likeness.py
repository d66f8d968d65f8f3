"""The reference's person in the solver's estimate, while a chunk is still mostly noise.

At a few flow times, what the solver believes the clean video to be is replaced by the person of the reference in the
scene, all but the mouth, and the steps that follow start from there: they bring in light, motion and speech (after
arXiv 2108.01073, which starts from a noised guide, and arXiv 2108.02938, which replaces a part of the estimate on the
way). The guide's latents are taken as speech synthesis takes recorded units: each as near as can be in how the mouth
moves, the jaw above all, and one after another as the reference itself goes on, or where its head moves on alike
(target and join cost of Hunt and Black, ICASSP 1996). So the head moves as this person's does, and the motion stream is
told so: but for the mouth, its estimate becomes the guide's. Where the guide's jaw is not as the estimate's, the guide
is corrected by what its own latents change with the jaw.

The mouth is left out: it follows the speech. So is, at later times, all that is lower than the nose. What is left out
takes the guide's looks all the same, lips' colour and beards: its mean over the chunk becomes the guide's, but for what
changes in the guide's mouth while it talks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, ROTATION, TRANSLATION, motion_index, mouth_channels

MOUTH = (0.5, 0.67, 0.114, 0.0855)  # of a face-centred crop, in crop sizes: middle x, y and radii of an ellipse
_SOFT = 0.667  # of the ellipse's squared radius: its edge
LATE = 0.7  # the flow time below which only the upper part is the guide's
UPPER = 0.54  # of a face-centred crop's height: where the upper part ends
_EDGE = 0.06  # of the height
MOVES = 4  # of the guide's mouth that its looks are not
# Costs of a guide's latent, in squared differences of normalised motion: what the jaw's and the lips' count, what the
# rest's counts where the reference is left, and what leaving it costs by itself.
JAW, LIPS, JOIN, LEAVE = 30.0, 0.3, 12.0, 20.0
_RIDGE = 2.0  # of the regression on the jaw, in latents of unit motion


@dataclass(frozen=True)
class Likeness:
    """
    Attributes:
        times: Flow times; the step that reaches or crosses one goes through the guide.
        latents: [1, C, R, h, w] of the guide; motion: [1, R, M] of it, or None without a motion stream.
        mask: [1, 1, 1, h, w], 1 where the estimate is the guide's; late: the same for steps that end below LATE.
        moves: [n, C h w] orthonormal, what changes most in the guide's mouth over its latents.
        slopes: [FRAMES_PER_LATENT, C h w], how the guide's latents change with the jaw in each of their frames, in
            normalised motion; None without this engine's motion space.
    """

    times: tuple[float, ...]
    latents: Tensor
    motion: Tensor | None
    mask: Tensor
    late: Tensor
    moves: Tensor
    slopes: Tensor | None = None

    def applies(self, t: float, t_next: float) -> bool:
        return any(t > at >= t_next for at in self.times)

    def step(
        self, z: Tensor, v: Tensor, t: float, t_next: float, motion: Tensor | None, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The Euler step of z [1, C, T, h, w] by its velocity from ``t`` to ``t_next``, through the guided estimate.

        Args:
            motion: [1, T, M] the estimate of its clean motion; before: [1, n, M] of what is carried, clean, or None. No
                other latent is a carried one.

        Returns: the latents at ``t_next`` and the guided estimate of the clean motion, None without such a stream.
        """
        clean, noise = z - t * v, z + (1 - t) * v
        mask = self.late if t_next < LATE else self.mask
        if motion is None or self.motion is None:
            guide = self.latents[:, :, self.nearest(clean)]
        else:
            at = self.follow(motion, before)
            guide = self.latents[:, :, at] + self.opened(motion, self.motion[:, at])
            motion = torch.where(mouth_channels(motion.shape[-1]).to(motion.device), motion, self.motion[:, at])
        return torch.lerp(torch.lerp(clean + self.looks(clean, guide), guide, mask), noise, t_next), motion

    def follow(self, motion: Tensor, before: Tensor | None = None) -> Tensor:
        """Which of the guide's latents go with motion [1, T, M]: int64 [T], the cheapest way through them (Viterbi)."""
        assert self.motion is not None
        theirs, rest = self.motion[0].float(), ~mouth_channels(motion.shape[-1]).to(motion.device)
        target = torch.cdist(_weighed(motion[0]), _weighed(theirs)).square()
        head = theirs[:, rest]
        first, *_, last = head.chunk(FRAMES_PER_LATENT, 1)
        going_on = torch.cat([first[1:], last[-1:]])
        join = JOIN * torch.cdist(going_on, first).square() + LEAVE
        join.diagonal(1).zero_()
        cost, ways = target[0], []
        if before is not None and before.shape[1] and bool(rest.any()):
            carried = torch.cdist(before[0, -1:, rest].float(), head)[0].argmin()
            cost = cost + join[carried]
        for row in target[1:]:
            through = cost[:, None] + join
            cost = through.amin(0) + row
            ways.append(through.argmin(0))
        found = [cost.argmin()]
        for way in reversed(ways):
            found.append(way[found[-1]])
        return torch.stack(found[::-1])

    def opened(self, motion: Tensor, guides: Tensor) -> Tensor | float:
        """What latents of motion ``guides`` [1, T, M] lack [1, C, T, h, w] of a jaw that is open as in ``motion``."""
        if self.slopes is None:
            return 0.0
        apart = (_jaw(motion[0]) - _jaw(guides[0])).to(self.slopes)
        _, c, _, h, w = self.latents.shape
        return (apart @ self.slopes).view(1, -1, c, h, w).transpose(1, 2)

    def nearest(self, clean: Tensor) -> Tensor:
        """Which of the guide's latents are nearest to the estimate [1, C, T, h, w], without a motion stream."""
        own, theirs = ((x * self.mask)[0].transpose(0, 1).flatten(1).float() for x in (clean, self.latents))
        return torch.cdist(own, theirs).argmin(1)

    def looks(self, clean: Tensor, guide: Tensor) -> Tensor:
        """What the estimate's mean over time lacks of the guide's [1, C, 1, h, w], but for the mouth's moves."""
        lacking = (guide - clean).mean(2, keepdim=True)
        return lacking - (self.moves.T @ (self.moves @ lacking.flatten())).view_as(lacking)


def _weighed(tokens: Tensor) -> Tensor:
    """Motion tokens [T, M], each channel as large as it counts in a target; of other motion spaces as they are."""
    if tokens.shape[1] != FRAMES_PER_LATENT * len(MOTION_NAMES):
        return tokens.float()
    counts = LIPS * mouth_channels(tokens.shape[1]).to(tokens.device, torch.float32)
    counts[motion_index("jawOpen") :: len(MOTION_NAMES)] = JAW
    return tokens.float() * counts.sqrt()


def _jaw(tokens: Tensor) -> Tensor:
    """How far the jaw is open in each frame of motion tokens [T, M]: [T, FRAMES_PER_LATENT]."""
    return tokens[:, motion_index("jawOpen") :: len(MOTION_NAMES)]


def slopes_of(latents: Tensor, motion: Tensor | None) -> Tensor | None:
    """``slopes`` of Likeness: ridge regression of latents [1, C, R, h, w] on their jaw, the head's mean pose held;
    None without motion [1, R, M] in this engine's space."""
    if motion is None or motion.shape[-1] != FRAMES_PER_LATENT * len(MOTION_NAMES):
        return None
    frames = motion[0].float().unflatten(1, (FRAMES_PER_LATENT, len(MOTION_NAMES)))
    pose = frames[:, :, ROTATION.start : TRANSLATION.stop].mean(1)
    seen = torch.cat([_jaw(motion[0].float()), pose], 1)
    seen = seen - seen.mean(0)
    apart = (latents - latents.mean(2, keepdim=True))[0].transpose(0, 1).flatten(1).float()
    penalty = _RIDGE * torch.eye(seen.shape[1], device=seen.device)
    return torch.linalg.solve(seen.T @ seen + penalty, seen.T @ apart)[:FRAMES_PER_LATENT].to(latents.dtype)


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
