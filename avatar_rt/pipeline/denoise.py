"""Stage 3: noise -> latents of one chunk, by a few Euler steps that read the reference's K/V."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatar_rt import ops
from avatar_rt.config import AvatarConfig, ChunkConfig, DiTConfig
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.guided import GuidedDiT, Pass
from avatar_rt.models.motion import rest_tokens
from avatar_rt.pipeline.likeness import Guide, Likeness
from avatar_rt.pipeline.reference import ReferenceCache
from avatar_rt.pipeline.schedule import ChunkPlan, GuidancePass, Schedule, level
from avatar_rt.runtime.trace import stage


@dataclass(frozen=True)
class Scene:
    """Scene image as a latent: [1, 16, 1, h, w], and its kept mask [1, 1, 1, h, w] (0 where the head was blanked)."""

    latent: Tensor
    kept: Tensor


@dataclass(frozen=True)
class ChunkState:
    """All that a chunk hands to the next: the anchor, the last latents, their motion, the level of the first chunk.

    None before the first.
    """

    anchor: Tensor | None = None
    latents: Tensor | None = None
    motion: Tensor | None = None
    level: Tensor | None = None


@dataclass(frozen=True)
class LatentChunk:
    """New latents of a chunk: [1, 16, t, h, w] (normalised), their motion [1, t, M] or None, absolute start; ``lead``
    of their frames lie before the video. ``guide``: uint8 [4 t, k H, k W, 3] what led them, or None."""

    latents: Tensor
    motion: Tensor | None
    start: int
    lead: int = 0
    guide: np.ndarray | None = None


@dataclass(frozen=True)
class Conditions:
    """What a chunk is generated from, besides the reference.

    Attributes:
        audio: [1, 4T or 4T-3, A] speech features of the chunk's frames (``Schedule.frames_of``).
        text, empty_text: [1, S, D] the prompt and the empty caption.
        likeness: The reference's person for the estimate, or None.
    """

    scene: Scene
    audio: Tensor
    text: Tensor
    empty_text: Tensor
    likeness: Likeness | None = None


Velocity = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


def _rows(ref: tuple[Any, ...] | None) -> dict[str, Any]:
    """The reference as the transformer takes it: packed where it was packed."""
    if ref is None:
        return {}
    return {"ref_k": ref[0], "ref_v": ref[1]} if isinstance(ref[0], Tensor) else {"packed": ref}


def _guidance(
    dit: Any,
    schedule: Schedule,
    wanted: tuple[GuidancePass, ...],
    anchor: Tensor,
    frames: int,
    reference: Callable[[], ReferenceCache],
    given: Conditions,
) -> Velocity:
    """The guided velocity of a chunk: all passes in one batch where the transformer can, else one after another."""
    passes = tuple(
        Pass(
            p.weight, p.motion_weight, given.text if p.text else given.empty_text, given.audio if p.audio else None,
            p.reference, p.resting,
        )
        for p in wanted
    )  # fmt: skip

    def references() -> tuple[Any, ...]:
        caches = [reference() if p.reference else None for p in passes]
        return tuple(None if c is None else c.packed or (c.k, c.v) for c in caches)

    if isinstance(dit, GuidedDiT):
        return dit.open(passes, anchor, frames, references, schedule.reference_strength)

    def in_turn(
        latents: Tensor, t: Tensor, motion: Tensor | None, resting: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        v = torch.zeros((), device=latents.device)
        vm = None if motion is None else torch.zeros_like(motion)
        for p, ref in zip(passes, references(), strict=True):
            with stage("denoise.pass"):
                dv, dm = dit(
                    latents, t, p.text, p.audio, anchor=anchor, anchor_t=t.new_zeros(1),
                    motion=resting if p.resting else motion, **_rows(ref), strength=schedule.reference_strength,
                )  # fmt: skip
            v = v + p.weight * dv
            if vm is not None and p.motion_weight:
                vm = vm + p.motion_weight * dm
        return v, vm

    return in_turn


class Solved(NamedTuple):
    """Latents [1, C, T, h, w] and motion [1, T, M] or None; the last guide that led them, or None."""

    latents: Tensor
    motion: Tensor | None
    guide: Guide | None


def solve(
    velocity: Velocity,
    cfg: DiTConfig,
    z: Tensor,
    motion: Tensor | None,
    times: Sequence[float],
    n: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    likeness: Likeness | None = None,
) -> Solved | None:
    """Latents [1, C, T, h, w] and motion [1, T, M] from the first of ``times`` to the last by Euler steps, but for the
    ``n`` carried ones, which are clean. With a ``likeness``, some steps go through its guides. None
    when ``cancelled`` (asked before each step) answers True."""
    believed, resting = motion, None  # clean motion; what is carried is clean, and at t = 1 the rest counts for nothing
    guide: Guide | None = None
    carried = torch.zeros(1, 1, z.shape[2], 1, 1, device=z.device)
    carried[:, :, :n] = 1
    for t, t_next in pairwise(times):
        if cancelled():
            return None
        t_frames = torch.full((1, z.shape[2]), t, device=z.device)
        t_frames[:, :n] = 0
        if motion is not None and believed is not None:
            resting = rest_tokens(motion, believed, t_frames)
        with stage("denoise.step"):
            v, vm = velocity(with_masks(z, cfg, 0, carried), t_frames, motion, resting)
        if motion is not None and vm is not None:
            believed = motion - t_frames[:, :, None] * vm
        after = ops.flow_step(z[:, :, n:], v[:, :, n:], t, t_next)
        moving = None if motion is None or vm is None else ops.flow_step(motion[:, n:], vm[:, n:], t, t_next)
        if likeness is not None and motion is not None and believed is not None and vm is not None:
            if likeness.begins(t, t_next):
                guide = likeness.guide(believed[:, n:], believed[:, :n])
            if guide is not None and likeness.leads(t):
                after, moving = guide.step(z[:, :, n:], v[:, :, n:], motion[:, n:], vm[:, n:], t, t_next)
        z = torch.cat([z[:, :, :n], after], dim=2)
        if motion is not None and moving is not None:
            motion = torch.cat([motion[:, :n], moving], dim=1)
    return Solved(z, motion, guide)


def settle(
    z: Tensor, n: int, state: ChunkState, chunk: ChunkConfig, kept: Tensor, led: bool = False
) -> tuple[Tensor, Tensor]:
    """A chunk's latents [1, C, T, h, w] as they are shown and carried on: held at the first chunk's level, and, unless
    a guide ``led`` them, eased in after the ``n`` carried ones. Also the level [1, C, 1, h, w] that the next chunk is
    held at."""
    if state.level is None:  # the first latent holds one frame and looks unlike the others
        return z, level(z[:, :, min(1, z.shape[2] - 1) :], kept)
    old, new = z[:, :, :n], z[:, :, n:]
    new = new + chunk.steady * (state.level - level(new, kept))
    if n and chunk.ease and not led:
        # The model's own step across a seam is larger than the one from latent to latent within a chunk.
        fading = chunk.ease ** torch.arange(1, new.shape[2] + 1, device=z.device).view(1, 1, -1, 1, 1)
        new = new + fading * (old[:, :, -1:] - new[:, :, :1])
    return torch.cat([old, new], dim=2), state.level


@stage("denoise")
def denoise_chunk(
    dit: VideoRefDiT | GuidedDiT,
    cfg: AvatarConfig,
    schedule: Schedule,
    plan: ChunkPlan,
    state: ChunkState,
    reference: Callable[[], ReferenceCache],
    given: Conditions,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    still_of: Callable[[Tensor], Tensor] = lambda latent: latent,
) -> tuple[LatentChunk, ChunkState] | None:
    """Generates one chunk; None when ``cancelled`` (asked before each step) answers True.

    ``reference`` gives the reference's K/V and is called once per pass that sees the reference. ``still_of`` makes an
    anchor of a led-in video's first latent, see ``pipeline.decode``; any other's first latent is one.
    """
    h, w = cfg.latent_size
    n, device, d = plan.overlap, given.audio.device, cfg.dit
    z = schedule.noise(plan, 0, (d.latent_channels, h, w)).to(device).transpose(0, 1)[None]
    motion = schedule.noise(plan, 1, (d.motion_dim,)).to(device)[None] if d.motion_dim else None
    if n and state.latents is not None:
        z = torch.cat([state.latents, z[:, :, n:]], dim=2)
        if motion is not None and state.motion is not None:
            motion = torch.cat([state.motion, motion[:, n:]], dim=1)
    scene = given.scene
    anchor = with_masks(scene.latent, d, scene.kept, 0) if state.anchor is None else with_masks(state.anchor, d, 1, 0)
    velocity = _guidance(dit, schedule, schedule.passes_of(plan), anchor, plan.latents, reference, given)
    solved = solve(velocity, d, z, motion, schedule.times, n, cancelled, given.likeness)
    if solved is None:
        return None
    z, motion, guide = solved
    z, held = settle(z, n, state, cfg.chunk, scene.kept, given.likeness is not None)
    keep = cfg.chunk.overlap
    lead = max(-schedule.frames_of(plan, cfg.vae.temporal_stride).start, 0)
    new, shown = None if motion is None else motion[:, n:], None if guide is None else guide.pictures()
    chunk = LatentChunk(z[:, :, n:], new, plan.start + n, lead, shown)
    first = state.anchor
    if first is None:
        first = still_of(z[:, :, :1]) if lead else z[:, :, :1]
    return chunk, ChunkState(
        anchor=first,
        latents=z[:, :, z.shape[2] - keep :],
        motion=None if motion is None else motion[:, motion.shape[1] - keep :],
        level=held,
    )
