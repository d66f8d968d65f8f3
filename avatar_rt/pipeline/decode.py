"""Stage 4: latents -> frames, latent by latent, carrying the decoder's convolution state.

A codec loses what is fine in a face: freckles, strands of hair, eyes. Where a guide led the latents
(``pipeline.likeness``) and the decoded picture is still that guide but for what was lost, the guide's own is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, MotionEncoder
from avatar_rt.models.streamed import StreamedVAE
from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.denoise import LatentChunk
from avatar_rt.runtime.trace import stage

ALIKE = 0.19  # of -1..1, the mean over a cell: that far apart, 1/e of what is lost is put back
_CELL = 4  # pixels; what a codec loses is finer, and half a stride of a VAE
_AROUND = 4  # frames on both sides; one alone that is left soft, where a chunk begins, would be seen


@dataclass(frozen=True)
class FrameChunk:
    """Frames uint8 [F, H, W, 3], RGB, and the absolute index of the first."""

    frames: Tensor
    start: int


@stage("decode")
def decode_chunk(
    vae: VideoVAE | StreamedVAE, chunk: LatentChunk, state: tuple[Tensor, ...] | None, scale: int = 1
) -> tuple[FrameChunk, tuple[Tensor, ...]]:
    """Decodes a chunk's new latents, enlarging the frames ``scale`` times (bicubic, until a refiner does better).

    ``state`` is None for the first chunk, then what the last call returned. A chunk's ``guide`` is put back into it.
    """
    z = vae.denormalize(chunk.latents.to(next(vae.parameters()).dtype))
    if chunk.lead:
        video, state = _led_in(vae, z)
        video = video[:, :, chunk.lead :]
    else:
        video, state = vae.decode_step(z, state)
    height = scale * video.shape[3]
    if chunk.guide is not None:
        video = restore(video, torch.from_numpy(chunk.guide[-video.shape[2] :]).to(video.device))
    return FrameChunk(
        to_pictures(video[0], height // video.shape[3]), 0 if chunk.start == 0 else 4 * chunk.start - 3
    ), state


def restore(video: Tensor, guide: Tensor) -> Tensor:
    """Puts back into a decoded video what it lost of its guide: all of it where the two are alike over some pixels and
    frames, nothing where the model made something else of it. A guide k times as large makes the video so large.

    Args:
        video: [1, 3, F, H, W] in -1..1, a chunk's frames; guide: uint8 [F, k H, k W, 3].

    Returns: fp32 [1, 3, F, k H, k W].
    """
    frames, theirs = video[0].float().transpose(0, 1), guide.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = theirs.shape[3] // frames.shape[3]
    apart = (F.avg_pool2d(theirs, _CELL * scale) - F.avg_pool2d(frames, _CELL)).square().amax(1)[None, None]
    time = min(_AROUND, (len(frames) - 1) // 2)
    apart = F.avg_pool3d(apart, (2 * time + 1, 3, 3), 1, (time, 1, 1), count_include_pad=False)[0, 0]
    if scale != 1:
        frames = F.interpolate(frames, scale_factor=scale, mode="bicubic", align_corners=False)
    share = F.interpolate(torch.exp(apart / -(ALIKE**2))[:, None], size=frames.shape[2:], mode="bilinear")
    return torch.lerp(frames, theirs, share).transpose(0, 1)[None]


def motion_of(encoder: MotionEncoder, chunk: LatentChunk, frames: int) -> np.ndarray | None:
    """The motion of a chunk's ``frames`` pictures, fp32 [frames, 62] in natural units; None where none was generated,
    or one of another motion space than the encoder's."""
    if chunk.motion is None or chunk.motion.shape[-1] != FRAMES_PER_LATENT * encoder.cfg.channels:
        return None
    each = chunk.motion.float().reshape(1, -1, encoder.cfg.channels)
    return np.asarray(encoder.denormalize(each)[0, -frames:].cpu().numpy())


def still_of(vae: VideoVAE | StreamedVAE, latents: Tensor) -> Tensor:
    """The last picture of a video's first latents [1, 16, t, h, w], as the latent of a still [1, 16, 1, h, w]."""
    video, _ = _led_in(vae, vae.denormalize(latents.to(next(vae.parameters()).dtype)))
    return vae.normalize(vae.encode(video[:, :, -1:].contiguous())[0]).to(latents.dtype)


def _led_in(vae: VideoVAE | StreamedVAE, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Decodes the start of a video whose first latent holds four frames: as if the same latent stood before it."""
    _, state = vae.decode_step(z[:, :, :1], None)
    return vae.decode_step(z, state)


def to_pictures(video: Tensor, scale: int) -> Tensor:
    """Video [3, F, H, W] in -1..1 -> uint8 [F, scale * H, scale * W, 3], bicubic."""
    if video.device.type == "cpu":
        frames = video.float().permute(1, 2, 3, 0).contiguous().numpy()
        height, width = frames.shape[1] * scale, frames.shape[2] * scale
        out = np.empty((len(frames), height, width, 3), np.uint8)
        for frame, target in zip(frames, out, strict=True):
            large = frame if scale == 1 else cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
            # One pass: to 0..255, rounded, clipped.
            cv2.addWeighted(large, 127.5, large, 0.0, 127.5, dst=target, dtype=cv2.CV_8U)
        return torch.from_numpy(out)
    frames = video.float().transpose(0, 1)
    if scale != 1:
        frames = F.interpolate(frames, scale_factor=scale, mode="bicubic", align_corners=False)
    frames = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return frames.contiguous()
