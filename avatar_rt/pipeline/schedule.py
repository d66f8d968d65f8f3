"""Stage 2: what to compute when: times of the solver, guidance passes, chunks of the timeline, noise of each latent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avatar_rt.config import ChunkConfig, SamplingConfig
from avatar_rt.errors import InputError


def flow_times(steps: int, shift: float) -> list[float]:
    """``steps + 1`` times from 1 (noise) to 0 (data), shifted by t' = s t / (1 + (s - 1) t) (arXiv 2403.03206)."""
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    return [shift * t / (1 + (shift - 1) * t) for t in (1 - i / steps for i in range(steps + 1))]


@dataclass(frozen=True)
class GuidancePass:
    """One pass of a step and its weight in the sum; which conditions it sees, and whether its mouth is at rest.

    ``motion_weight`` is its weight in the sum of motion velocities, 0 where it has no motion.
    """

    weight: float
    reference: bool
    audio: bool
    text: bool
    resting: bool = False
    motion_weight: float = 0.0


def guidance_passes(sampling: SamplingConfig, has_text: bool) -> tuple[GuidancePass, ...]:
    """Nested guidance, reference then audio then text:

    v = v0 + w_r (v_r - v0) + w_a (v_ra - v_r) + w_t (v_rat - v_ra), collected by pass; passes of weight 0 are not run.
    Inner guidance of the motion stream adds w_m (v_rat - v_s) to the picture's velocity, where s is silence: nothing is
    heard, and the motion's mouth is at rest. arXiv 2502.02492 goes away from no motion at all, which a model must have
    been trained with; from rest needs no training. The motion's own velocity stays. Either sum of weights is 1. With a
    ``motion_audio_scale`` s the motion's is v_r + s (v_rat - v_r): what brings the picture out drives the motion to a
    grimace.
    """
    r, a = sampling.reference_scale, sampling.audio_scale
    t = sampling.text_scale if has_text else a
    m, s = sampling.motion_scale, sampling.motion_audio_scale
    own = (1 - r, r - a, a - t, t) if s is None else (0.0, 1 - s, 0.0, s)
    passes = (
        GuidancePass(1 - r, False, False, False, False, own[0]),
        GuidancePass(r - a, True, False, False, False, own[1]),
        GuidancePass(a - t, True, True, False, False, own[2]),
        GuidancePass(t + m, True, True, has_text, False, own[3]),
        GuidancePass(-m, True, False, False, True, 0.0),
    )
    return tuple(p for p in passes if p.weight != 0 or p.motion_weight != 0)


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: absolute index of its first latent, how many latents it has, how many of them are carried over."""

    index: int
    start: int
    overlap: int
    latents: int


@dataclass(frozen=True)
class Schedule:
    """What a request computes when: solver times, guidance passes, chunks, and the noise of every latent."""

    times: tuple[float, ...]
    passes: tuple[GuidancePass, ...]
    chunk: ChunkConfig
    seed: int
    reference_strength: float = 1.0
    carried_passes: tuple[GuidancePass, ...] = ()
    motion_temperature: float = 1.0

    def passes_of(self, plan: ChunkPlan) -> tuple[GuidancePass, ...]:
        """The guidance passes of a chunk: a continued one has its own, where the schedule has them."""
        return self.carried_passes if plan.overlap and self.carried_passes else self.passes

    def plan(self, index: int) -> ChunkPlan:
        """The ``index``-th chunk of an endless timeline; every chunk has the same length."""
        c = self.chunk
        return ChunkPlan(index, index * (c.latents - c.overlap), c.overlap if index else 0, c.latents)

    def frames_of(self, plan: ChunkPlan, per: int) -> range:
        """The frames that a chunk's latents hold, ``per`` each, carried ones too. A led-in video's begin before 0."""
        first = per * (plan.start - 1) + 1
        return range(first if self.chunk.lead_in else max(first, 0), first + per * plan.latents)

    def noise(self, plan: ChunkPlan, stream: int, shape: tuple[int, ...]) -> Tensor:
        """Normal noise [T, *shape] fp32; a latent's depends on (seed, stream, absolute index), never on the cut.

        Stream 0 is the picture's, 1 the motion's, which is as large as its temperature.
        """
        rows = []
        for index in range(plan.start, plan.start + plan.latents):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index * 2 + stream) % (2**63 - 1))
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows) * (self.motion_temperature if stream == 1 else 1.0)


def level(latents: Tensor, kept: Tensor) -> Tensor:
    """What should not creep over a video: [1, C, t, h, w] -> [1, C, 1, h, w].

    Where the scene was kept (``kept`` [1, 1, 1, h, w] is 1), each place's mean over time, for a place stands still;
    elsewhere, where the head moves, one mean per channel. Chunks are shifted to the first one's level, as adaptive
    instance normalisation shifts means (arXiv 1703.06868), before they are shown and carried on.
    """
    mean, head = latents.mean(2, keepdim=True), 1 - kept
    share = (mean * head).sum((3, 4), keepdim=True) / head.sum((3, 4), keepdim=True).clamp(min=1)
    return kept * mean + head * share


def carried(sampling: SamplingConfig) -> SamplingConfig:
    """What holds in a chunk that continues another."""
    return replace(sampling, reference_scale=min(sampling.reference_scale, sampling.carried_scale))


def make_schedule(sampling: SamplingConfig, chunk: ChunkConfig, seed: int, *, has_text: bool) -> Schedule:
    """Raises InputError on an impossible number of steps."""
    times = flow_times(sampling.steps, sampling.shift)
    return Schedule(
        tuple(times), guidance_passes(sampling, has_text), chunk, seed, sampling.reference_strength,
        guidance_passes(carried(sampling), has_text), sampling.motion_temperature,
    )  # fmt: skip
