"""Losses of motion read back off decoded frames: does the face move as it should, does the mouth fit the sound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.models.motion import MotionEncoder, motion_index
from avatar_rt.models.speech import MOUTH_COEFFICIENTS

WEIGHTS = {
    "jawOpen": 6.0, "eyeBlinkLeft": 4.0, "eyeBlinkRight": 4.0, "mouthPucker": 4.0, "mouthFunnel": 3.0,
    "mouthClose": 3.0, "mouthSmileLeft": 2.0, "mouthSmileRight": 2.0, "yaw": 3.0, "pitch": 3.0, "roll": 3.0,
}  # fmt: skip
"""What the encoder reads well and the eye notices; every other channel counts once."""

LIPS = ("jawOpen", "mouthFunnel", "mouthPucker", "mouthClose")
"""What both the picture and the sound can be read for."""


def read(encoder: MotionEncoder, frames: Tensor) -> Tensor:
    """Normalised motion [n, L, 62] of frames [n, 3, L, H, W], which are face-centred crops; differentiable."""
    pictures = frames.transpose(1, 2).flatten(0, 1)
    size = encoder.cfg.size
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return encoder.read(pictures).unflatten(0, (len(frames), -1))


def motion_fidelity(encoder: MotionEncoder, made: Tensor, motion: Tensor) -> Tensor:
    """Huber distance between what is read off the frames and the true motion: from motion to picture and back.

    made: [n, 3, L, H, W]; motion: [n, L, 62] normalised. Returns [n].
    """
    weight = torch.ones(motion.shape[-1], device=motion.device)
    for name, w in WEIGHTS.items():
        weight[motion_index(name)] = w
    error = F.smooth_l1_loss(read(encoder, made), motion.float(), beta=0.5, reduction="none")
    return (error * weight / weight.mean()).mean((1, 2))


def sync(encoder: MotionEncoder, made: Tensor, heard: Tensor) -> Tensor:
    """One minus the cosine between the lips' course in the frames and in the sound, each less its mean.

    Blind to how far this person opens the mouth and to how it rests; sees only whether it moves with the sound. Where
    the sound holds the lips still there is nothing to agree with, and the loss fades.

    made: [n, 3, L, H, W]; heard: [n, L, 11] of ``SpeechEncoder.heads``. Returns [n], in 0..2.
    """
    seen = encoder.denormalize(read(encoder, made))[..., [motion_index(name) for name in LIPS]]
    told = heard[..., [1 + MOUTH_COEFFICIENTS.index(name) for name in LIPS]].float()
    seen, told = (x - x.mean(1, keepdim=True) for x in (seen, told))
    length = told.flatten(1).norm(dim=1)
    cosine = (seen * told).flatten(1).sum(1) / (seen.flatten(1).norm(dim=1) * length).clamp(min=1e-3)
    return (1 - cosine) * length / (length + 0.1)
