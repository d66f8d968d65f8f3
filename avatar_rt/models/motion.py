"""The motion space (names, grouping) and the encoder that reads it off face crops."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.config import MOTION_CHANNELS, MotionConfig
from avatar_rt.errors import InputError

ARKIT_NAMES: tuple[str, ...] = (
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight",
    "cheekPuff", "cheekSquintLeft", "cheekSquintRight",
    "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight",
    "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight",
    "jawForward", "jawLeft", "jawOpen", "jawRight",
    "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel",
    "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker",
    "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    "mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight",
    "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight", "tongueOut",
)  # fmt: skip
"""The 52 ARKit coefficients, alphabetical, each in 0..1. Left and right are the person's own."""

MOTION_NAMES: tuple[str, ...] = ARKIT_NAMES + (
    "yaw", "pitch", "roll",
    "translateX", "translateY", "logScale",
    "gazeLeftX", "gazeLeftY", "gazeRightX", "gazeRightY",
)  # fmt: skip
"""All channels of a motion frame.

Rotation is in radians: positive yaw turns to the picture's right, pitch looks down, roll tilts anticlockwise in the
picture. Gaze is in radians against the head, x to the picture's right and y down, the person's left eye first.
Translation is in the picture: x to the right and y down, in crop widths, from the crop's centre; ``logScale`` is the
natural logarithm of the face's size relative to a standard crop. So moving a picture by d crop widths adds d, and
zooming by s about its centre multiplies x and y by s and adds log(s).
"""

ROTATION = slice(52, 55)
TRANSLATION = slice(55, 58)
GAZE = slice(58, 62)
FRAMES_PER_LATENT = 4


def motion_index(name: str) -> int:
    """Channel of a name in MOTION_NAMES. Raises InputError on an unknown one."""
    if name not in MOTION_NAMES:
        raise InputError(f"motion channel: expected one of {', '.join(MOTION_NAMES)}, got {name!r}")
    return MOTION_NAMES.index(name)


def group_motion(motion: Tensor) -> Tensor:
    """Group motion by latent frame: [B, F, M] with F = 1 + 4k -> [B, 1 + k, 4M].

    Latent 0 holds its only frame four times, latent k frames 4k-3..4k. Raises InputError on another F.
    """
    b, f, m = motion.shape
    if f % FRAMES_PER_LATENT != 1:
        raise InputError(f"motion: expected 1 + 4k frames, got {f} (shape {list(motion.shape)})")
    first = motion[:, :1].expand(b, FRAMES_PER_LATENT - 1, m)
    return torch.cat((first, motion), dim=1).reshape(b, -1, FRAMES_PER_LATENT * m)


def mouth_channels(dim: int) -> Tensor:
    """Which of ``dim`` values of a motion token are of the jaw, the lips or the tongue: bool [dim]. All of them in a
    motion space of another size than this one's."""
    if dim != FRAMES_PER_LATENT * len(MOTION_NAMES):
        return torch.ones(dim, dtype=torch.bool)
    return torch.tensor([name.startswith(("jaw", "mouth", "tongue")) for name in MOTION_NAMES] * FRAMES_PER_LATENT)


def rest_tokens(motion: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """Noisy motion tokens [B, T, M] with the mouth at rest and nothing else changed.

    Args:
        motion: Normalised tokens at times ``t`` [B, T]; clean: what they are believed to be without noise.

    Returns: ``motion`` with the jaw's, lips' and tongue's share of ``clean`` taken out, so that they are noised means;
    in a motion space of another size, with all of it taken out.
    """
    mouth = mouth_channels(motion.shape[-1]).to(motion)
    return motion - (1 - t[:, :, None]) * clean * mouth


def ungroup_motion(tokens: Tensor) -> Tensor:
    """Undo group_motion: [B, T, 4M] -> [B, 1 + 4 (T - 1), M]; frame 0 is the mean of its four copies."""
    b, t, c = tokens.shape
    if t < 1 or c % FRAMES_PER_LATENT:
        raise InputError(f"motion tokens: expected [B, T >= 1, a multiple of 4], got {list(tokens.shape)}")
    frames = tokens.reshape(b, t * FRAMES_PER_LATENT, c // FRAMES_PER_LATENT)
    first = frames[:, :FRAMES_PER_LATENT].mean(dim=1, keepdim=True)
    return torch.cat((first, frames[:, FRAMES_PER_LATENT:]), dim=1)


def _other_side(name: str) -> str:
    for one, other in (("Left", "Right"), ("Right", "Left")):
        if one in name:
            return name.replace(one, other)
    return name


_MIRROR = tuple(MOTION_NAMES.index(_other_side(name)) for name in MOTION_NAMES)
_NEGATED = tuple(MOTION_NAMES.index(name) for name in ("yaw", "roll", "translateX", "gazeLeftX", "gazeRightX"))


def mirror_motion(motion: Tensor) -> Tensor:
    """Motion [..., 62] of the same picture seen in a mirror (left and right swapped)."""
    mirrored = motion[..., list(_MIRROR)]
    mirrored[..., list(_NEGATED)] *= -1
    return mirrored


class _Stage(nn.Module):
    """Halve the picture, then one residual convolution. [B, Ci, H, W] -> [B, Co, H/2, W/2]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1)
        self.norm_down = nn.GroupNorm(8, dim_out)
        self.conv = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.norm_conv = nn.GroupNorm(8, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm_down(self.down(x)))
        return x + F.silu(self.norm_conv(self.conv(x)))


class MotionEncoder(nn.Module):
    """Face crop -> motion, frame by frame.

    The buffers ``mean`` and ``std`` [M] hold the statistics of the corpus: the network predicts normalised channels,
    and ``normalize``/``denormalize`` give motion tokens their unit scale for flow matching.
    """

    def __init__(self, cfg: MotionConfig) -> None:
        super().__init__()
        if cfg.size < 16 or cfg.size % 16:
            raise InputError(f"motion.size: expected a multiple of 16, got {cfg.size}")
        if cfg.base_dim % 8:
            raise InputError(f"motion.base_dim: expected a multiple of 8, got {cfg.base_dim}")
        self.cfg = cfg
        c = cfg.base_dim
        grid = cfg.size // 16
        self.stem = nn.Conv2d(3, c, 4, stride=2, padding=1)
        self.stages = nn.Sequential(_Stage(c, 2 * c), _Stage(2 * c, 3 * c), _Stage(3 * c, 4 * c))
        self.squeeze = nn.Conv2d(4 * c, c, 1)
        # Position matters (where the lips are), so the last grid is flattened, not averaged.
        self.hidden = nn.Linear(c * grid * grid, 5 * c)
        self.out = nn.Linear(5 * c, cfg.channels)
        self.register_buffer("mean", torch.zeros(cfg.channels))
        self.register_buffer("std", torch.ones(cfg.channels))

    def normalize(self, motion: Tensor) -> Tensor:
        """[..., M] in natural units -> about zero mean and unit variance, fp32."""
        return (motion.float() - self.mean.float()) / self.std.float()

    def denormalize(self, motion: Tensor) -> Tensor:
        """Undo normalize: [..., M] -> natural units, fp32."""
        return motion.float() * self.std.float() + self.mean.float()

    def read(self, frames: Tensor) -> Tensor:
        """frames [B, 3, size, size] in -1..1 -> normalised motion [B, M], fp32."""
        size = self.cfg.size
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, size, size):
            raise InputError(f"frames: expected [B, 3, {size}, {size}], got {list(frames.shape)}")
        x = F.silu(self.stem(frames.to(self.stem.weight.dtype)))
        x = self.squeeze(self.stages(x))
        return self.out(F.silu(self.hidden(x.flatten(1)))).float()

    def forward(self, frames: Tensor) -> Tensor:
        """Read motion off face crops.

        Args:
            frames: [B, 3, size, size] in -1..1, any float dtype; one face-centred crop each.

        Returns: [B, 62] fp32 in natural units, channels as in MOTION_NAMES.
        Raises: InputError on another shape.
        """
        return self.denormalize(self.read(frames))


assert len(MOTION_NAMES) == MOTION_CHANNELS
