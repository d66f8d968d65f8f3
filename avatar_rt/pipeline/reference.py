"""Stage 1: face crops and sound of the reference clip -> its context (level 1) -> K/V of every block (level 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.config import FPS, SAMPLES_PER_FRAME, AvatarConfig, frames_of_latents
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.motion import MotionEncoder, group_motion
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.ops import PackedReference, pack_reference
from avatar_rt.runtime.offload import Prefetched, copies_for, to_host
from avatar_rt.runtime.trace import stage


@dataclass(frozen=True)
class ReferenceContext:
    """What the reference clip is to the transformer, before any weight of it is applied.

    Attributes:
        latents: [1, 18, T, h, w] clean latents with their mask channels (scene 1, carried 0).
        audio: [1, 4T, A] features of the clip's own sound, or None when it has none.
        motion: [1, T, M] normalised motion tokens, or None when the model has no motion stream.
        text: [1, S, D] the empty caption.
    """

    latents: Tensor
    audio: Tensor | None
    motion: Tensor | None
    text: Tensor


@dataclass(frozen=True)
class ReferenceCache:
    """K and V of the reference rows in every block.

    Attributes:
        k, v: [layers, 1, R, N, D] each.
        packed: The same, per block, as this machine's attention kernel reads them; None when not packed. With ``k`` and
            ``v`` offloaded these are all that is left of them.
    """

    k: Tensor
    v: Tensor
    packed: Sequence[PackedReference] | None = None


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> fp32 [1, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@stage("reference.context")
def read_reference(
    frames: np.ndarray,
    wave: np.ndarray | None,
    text: Tensor,
    cfg: AvatarConfig,
    vae: VideoVAE,
    speech: SpeechEncoder,
    motion: MotionEncoder,
) -> ReferenceContext:
    """Encodes the reference clip once.

    Args:
        frames: uint8 [F, height, width, 3] face-centred crops at 25 fps.
        wave: fp32 [S] 16 kHz sound of the clip at -16 LUFS, or None.
        text: [1, S, D] the empty caption's embedding.

    Raises: InputError when the clip is shorter than two latent frames (5 video frames).
    """
    # The first latent frame holds one video frame and looks unlike the others, so it only warms the encoder up.
    num_latents = min(cfg.reference_latents, (len(frames) - 1) // 4)
    if num_latents < 1:
        raise InputError(f"reference: expected at least 5 frames ({5 / FPS:.1f} s) with a face, got {len(frames)}")
    num_frames = frames_of_latents(num_latents + 1)
    video = to_video(frames[:num_frames]).to(next(vae.parameters()).device)
    latents = vae.normalize(vae.encode(video)[0].float())[:, :, 1:]
    features = None
    if wave is not None:
        sound = torch.zeros(num_frames * SAMPLES_PER_FRAME)
        given = torch.from_numpy(np.ascontiguousarray(wave, np.float32))[: len(sound)]
        sound[: len(given)] = given
        features = speech(sound[None].to(video.device))[:, 1:]
    tokens = None
    if cfg.dit.motion_dim:
        tokens = read_motion(video, motion)[:, 1:]
    return ReferenceContext(with_masks(latents, cfg.dit, 1, 0), features, tokens, text)


def read_motion(video: Tensor, motion: MotionEncoder) -> Tensor:
    """Normalised motion tokens [1, T, M] of face crops [1, 3, F, H, W] in -1..1, F = 1 + 4k."""
    size = motion.cfg.size
    pictures = video[0].transpose(0, 1)
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return group_motion(motion.read(pictures)[None].clamp(-5, 5))


@stage("reference.cache")
def pack_cache(cache: ReferenceCache) -> ReferenceCache:
    """The cache with its packed form, made once per request: the same bits come out of attention."""
    if cache.packed is not None:
        return cache
    return replace(cache, packed=tuple(pack_reference(k, v) for k, v in zip(cache.k, cache.v, strict=True)))


@stage("reference.offload")
def offload_cache(cache: ReferenceCache) -> ReferenceCache:
    """The packed cache on the host, block by block; each block comes to the device while the one before is at work."""
    device = cache.k.device
    blocks = [to_host(pack_reference(k, v)) for k, v in zip(cache.k, cache.v, strict=True)]
    return ReferenceCache(to_host(cache.k), to_host(cache.v), Prefetched(blocks, copies_for(device)))


def encode_reference(dit: VideoRefDiT, context: ReferenceContext) -> ReferenceCache:
    """The reference's K/V in every block: depends on the context and the weights, on nothing else."""
    return ReferenceCache(*dit.encode_reference(context.latents, context.text, context.audio, context.motion))
