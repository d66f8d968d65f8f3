"""Flow matching's arithmetic, shared by all stages: times, the path between data and noise, the loss.

z_t = (1 - t) x + t eps with target v = eps - x (rectified flow, arXiv 2209.03003); times are logit-normal and shifted
by the number of tokens (arXiv 2403.03206). t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError

# ---- times -----------------------------------------------------------------------------------------------------------


def logit_normal(count: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """``count`` times sigmoid(u), u normal: the middle of the path is drawn most often (arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def shift(t: Tensor, by: float) -> Tensor:
    """t' = a t / (1 + (a - 1) t), towards noise for a > 1. A group: shift by a, then b, is shift by a b."""
    if by <= 0:
        raise InputError(f"shift: expected more than 0, got {by}")
    return by * t / (1 + (by - 1) * t)


def token_shift(tokens: int, cfg: AvatarConfig) -> float:
    """The shift for a window of so many tokens: a whole chunk's is the one that ``cfg`` samples with, others' go with
    the root of their tokens. More tokens say the same thing more often, so it takes more noise to drown it."""
    return cfg.sampling.shift * math.sqrt(tokens / (cfg.chunk.latents * cfg.tokens_per_frame))


# ---- the path --------------------------------------------------------------------------------------------------------


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t; t broadcasts against x."""
    return torch.lerp(x, noise, t)


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dz/dt, the same all along the straight path."""
    return noise - x


def data_of(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The estimate of x that a velocity at (z, t) implies."""
    return z - t * v


def noise_of(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The estimate of the noise that a velocity at (z, t) implies."""
    return z + (1 - t) * v


# ---- the loss --------------------------------------------------------------------------------------------------------


def region_map(masks: Tensor, face: float, mouth: float) -> Tensor:
    """Masks [B, 2, h, w] of face and mouth -> weights [B, h, w], mean 1 over each picture whatever the masks hold."""
    weight = 1 + face * masks[:, 0] + mouth * masks[:, 1]
    return weight / weight.mean((1, 2), keepdim=True)


def mean_of(error: Tensor, counted: Tensor) -> Tensor:
    """Mean of error [B, T] over those with ``counted`` (bool or weights [B, T]); 0 where none is."""
    counted = counted.to(error.dtype)
    return (error * counted).sum() / counted.sum().clamp(min=1e-6)


def flow_errors(v: Tensor, target: Tensor, region: Tensor) -> Tensor:
    """Weighted squared error [B, T] of velocities [B, C, T, h, w], region [B, h, w]."""
    return ((v - target).square() * region[:, None, None]).mean((1, 3, 4))


def temporal_loss(v: Tensor, target: Tensor, region: Tensor, free: Tensor) -> Tensor:
    """The same loss on differences between neighbouring latents: most of a face's latent never changes in a clip, and
    the little that does is what speech decides. ``free`` bool [B, T]: the latents that count; 0 without two of them."""
    if v.shape[2] < 2:
        return v.sum() * 0
    change = (v - target).diff(dim=2)
    error = 0.5 * (change.square() * region[:, None, None]).mean((1, 3, 4))
    return mean_of(error, free[:, 1:] & free[:, :-1])


# ---- buckets and drop-out --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """One size of windows: how many latents of how many people at what resolution, and when.

    Attributes:
        frames: Latent frames of a window.
        people: References of a batch.
        windows: Windows of each person; they share the encoded reference, which is most of a batch's rows. At
            ``tiny``'s size, four latents of reference, 32 windows of one latent take half the time with 8 people that
            they do with 32.
        down: Latents are averaged over squares of this side: 2 is half the resolution.
        cut: Side of a square around the mouth that is all of the frames that is trained on, in latents; 0 is all of
            them. A mouth for a quarter of the rows (patch diffusion, arXiv 2304.12526).
        first, last: Share of the steps at the run's start and at its end; between them it changes linearly.
    """

    frames: int
    people: int
    windows: int = 1
    down: int = 1
    cut: int = 0
    first: float = 1.0
    last: float = 1.0

    def tokens(self, cfg: AvatarConfig) -> int:
        """Tokens of one window's latents."""
        per_frame = self.cut**2 // (cfg.dit.patch[1] * cfg.dit.patch[2]) if self.cut else cfg.tokens_per_frame
        return self.frames * per_frame // self.down**2


def draw_bucket(buckets: tuple[Bucket, ...], done: float, generator: torch.Generator) -> Bucket:
    """A bucket at ``done`` (0..1) of the run: short and small first, long and large later, none ever quite gone."""
    done = min(max(done, 0.0), 1.0)
    shares = torch.tensor([(1 - done) * b.first + done * b.last for b in buckets])
    return buckets[int(torch.multinomial(shares, 1, generator=generator))]


def expected_tokens(buckets: tuple[Bucket, ...], cfg: AvatarConfig) -> float:
    """Generated tokens of a step, on average over a run: what two curricula must have in common to compare."""
    first, last = (sum(getattr(b, k) for b in buckets) for k in ("first", "last"))
    share = [(b.first / first + b.last / last) / 2 for b in buckets]
    return sum(p * b.tokens(cfg) * b.people * b.windows for p, b in zip(share, buckets, strict=True))


def kept(
    count: int,
    rates: dict[str, float],
    all_rate: float,
    generator: torch.Generator,
    alike: torch.Generator,
    *,
    apart: tuple[str, ...] = (),
    at_once: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Which conditions each of ``count`` windows keeps, bool [count] by name.

    Each is dropped by its own rate and its own draw, whatever becomes of the others; those of ``at_once`` for a whole
    batch, drawn from ``alike``. And ``all_rate`` of the batches lose every condition that is not named in ``apart``.
    """
    together = torch.rand((), generator=alike) >= all_rate
    keep = {}
    for name, rate in rates.items():
        draws = torch.rand((), generator=alike).expand(count) if name in at_once else None
        own = (torch.rand(count, generator=generator) if draws is None else draws) >= rate
        keep[name] = own if name in apart else own & together
    return keep
