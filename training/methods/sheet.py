"""What validation shows of a run: true and made frames side by side, as one picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from avatar_rt.models.dit import with_masks
from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.schedule import flow_times
from training.methods.windows import Batch

PEOPLE = 4  # of a sheet
FRAMES = 5  # of each video


@torch.no_grad()
def sample(method: Any, b: Batch, g: torch.Generator) -> Tensor:
    """A batch's windows [B, C, T, h, w], made from noise by Euler's method under every condition that the stage has.

    ``method`` is a ``FlowMethod``; no guidance, so this is the model and nothing else. The noise comes from ``g``.
    """
    cfg, device, frames = method.cfg, method.device, b.given.shape
    b, keep = b.to(device), {k: torch.full(frames[:1], rate < 1, device=device) for k, rate in method.rates().items()}
    text = method.context(b.clip, keep["text"])
    told, motion_target = method.conditions(b, torch.ones(frames, device=device), keep, g)
    z = torch.randn(b.x.shape, generator=g).to(device)
    motion = None if motion_target is None else torch.randn(b.motion.shape, generator=g).to(device)
    for now, then in pairwise(flow_times(cfg.sampling.steps, cfg.sampling.shift)):
        if motion is not None:
            told["motion"] = motion
        at = torch.full(frames, now, device=device)
        v, vm = method.module["dit"](with_masks(z, cfg.dit, 0, 0), at, text, spread=method.spread, **told)
        z = z + (then - now) * v
        motion = None if motion is None else motion + (then - now) * vm
    return z


@torch.no_grad()
def write_samples(method: Any, vae: VideoVAE, b: Batch, path: Path) -> None:
    """One row for each window: who is referred to where the stage has that, true frames, made frames."""
    made = sample(method, b, torch.Generator().manual_seed(2))
    vae, b = vae.to(method.device), b.to(method.device)

    def shown(z: Tensor, count: int, skip: int = 0) -> Tensor:
        video = vae.decode(vae.denormalize(z)).float().cpu()[:, :, skip:]
        return video[:, :, torch.linspace(0, video.shape[2] - 1, count).round().long()]

    def led_in(z: Tensor) -> Tensor:
        return torch.cat([z[:, :, :1], z], dim=2)  # the decoder takes the first for a latent of one frame

    if method.cfg.chunk.lead_in:
        parts = [shown(led_in(z), FRAMES, 1) for z in (b.x, made)]
    else:
        parts = [shown(z, FRAMES) for z in (b.x, made)]
    if method.cfg.dit.reference:
        first = led_in(b.ref_latents[:, : b.x.shape[1], :1])
        parts.insert(0, shown(first, 1, 4).repeat_interleave(b.windows, 0))
    save_sheet([torch.cat([part[i] for part in parts], 1) for i in range(len(b.x))], path)


def save_sheet(rows: list[Tensor], path: Path, *, across: int = 1, scale: int = 2) -> None:
    """Rows of frames [3, N, H, W] in -1..1 as one PNG, ``across`` rows side by side, each pixel ``scale`` wide."""
    lines = [torch.cat(list(r.unbind(1)), dim=2) for r in rows]
    across = min(across, len(lines))
    whole = [torch.cat(lines[i : i + across], dim=2) for i in range(0, len(lines) - len(lines) % across, across)]
    picture = torch.cat(whole, dim=1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes())
