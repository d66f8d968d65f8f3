"""Stage 4: latents -> frames, latent by latent, carrying the decoder's convolution state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.denoise import LatentChunk
from avatar_rt.runtime.trace import stage


@dataclass(frozen=True)
class FrameChunk:
    """Frames uint8 [F, H, W, 3], RGB, and the absolute index of the first."""

    frames: Tensor
    start: int


@stage("decode")
def decode_chunk(
    vae: VideoVAE, chunk: LatentChunk, state: tuple[Tensor, ...] | None, scale: int = 1
) -> tuple[FrameChunk, tuple[Tensor, ...]]:
    """Decodes a chunk's new latents, enlarging the frames ``scale`` times (bicubic, until a refiner does better).

    ``state`` is None for the first chunk, then what the last call returned.
    """
    z = vae.denormalize(chunk.latents.to(next(vae.parameters()).dtype))
    video, state = vae.decode_step(z, state)
    frames = video[0].float().transpose(0, 1)
    if scale != 1:
        frames = F.interpolate(frames, scale_factor=scale, mode="bicubic", align_corners=False)
    frames = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return FrameChunk(frames.contiguous(), 0 if chunk.start == 0 else 4 * chunk.start - 3), state
