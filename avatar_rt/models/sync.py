"""Our own lip-sync network: windows of five mouth crops and of sound, as points whose distance says how well they fit.

It takes the place of SyncNet (Chung and Zisserman 2016) where nobody has SyncNet's weights. Unlike SyncNet's, the
sound's view is longer than the five frames (about 0.35 s to each side), the picture is grey and shows the mouth only,
and both are standardised over the clip, which is what carries over from rendered to real people.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.models.speech import LogMel

PIXELS = 40  # side of a mouth crop, grey
WINDOW = 5  # frames
EMBEDDING = 64
NUM_MELS = 40
_MEL_PAD = 120  # samples to each side, so that four mel frames lie evenly in a video frame


class _Picture(nn.Module):
    """Mouth crops -> features of each frame. [N, 2, PIXELS, PIXELS] -> [N, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 5, stride=2, padding=2)
        self.down = nn.ModuleList(
            (nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(32, 48, 3, stride=2, padding=1))
        )
        self.same = nn.ModuleList((nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1)))
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (16, 32, 32, 48, 48))
        self.out = nn.Linear(48 * 25, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.stem(x)))
        for i, (down, same) in enumerate(zip(self.down, self.same, strict=True)):
            x = F.silu(self.norms[1 + 2 * i](down(x)))
            x = x + F.silu(self.norms[2 + 2 * i](same(x)))
        return self.out(x.flatten(1))


class _Turn(nn.Module):
    """Residual convolution in time over the last axis of [B, dim, L]; without padding the result is 2 d shorter."""

    def __init__(self, dim: int, dilation: int, pad: bool) -> None:
        super().__init__()
        self.dilation, self.pad = dilation, pad
        self.norm = nn.GroupNorm(1, dim)
        self.widen = nn.Conv1d(dim, dim, 3, dilation=dilation)
        self.narrow = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = F.pad(x, (d, d)) if self.pad else x
        h = self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return x[..., d:-d] + self.narrow(F.silu(self.widen(h)))


class SyncNetwork(nn.Module):
    """Video windows and sound windows to points on one unit sphere, so that a distance means the same in every clip.

    Without the norm the picture's points grow long and distances say how long they are: a frozen picture came nearest.
    """

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.picture = _Picture(dim)
        self.picture_turns = nn.ModuleList((_Turn(dim, 1, pad=False), _Turn(dim, 1, pad=False)))
        self.picture_out = nn.Linear(dim, EMBEDDING)
        self.mel = LogMel(NUM_MELS)
        self.sound_stem = nn.ModuleList(
            (
                nn.Conv1d(NUM_MELS, dim, 5, padding=2),
                nn.Conv1d(dim, dim, 4, stride=2, padding=1),
                nn.Conv1d(dim, dim, 4, stride=2, padding=1),
            )
        )
        self.sound_turns = nn.ModuleList(_Turn(dim, d, pad=True) for d in (1, 2, 4))
        self.sound_out = nn.Linear(dim, EMBEDDING)

    def picture_features(self, mouths: Tensor) -> Tensor:
        """Grey mouths [B, F, PIXELS, PIXELS] -> [B, F, dim], each frame for itself but for the clip's own mean."""
        x = mouths.float()
        x = x - x.mean((1, 2, 3), keepdim=True)
        x = x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1.0)
        moving = x - x.mean(1, keepdim=True)  # without what the face always looks like
        both = torch.stack((x, moving / moving.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=0.02)), dim=2)
        return self.picture(both.flatten(0, 1)).unflatten(0, x.shape[:2])

    def picture_points(self, features: Tensor) -> Tensor:
        """[B, F, dim] -> [B, F - 4, EMBEDDING], one for every window of five frames."""
        x = features.transpose(1, 2)
        for turn in self.picture_turns:
            x = turn(x)
        return F.normalize(self.picture_out(x.transpose(1, 2)).float(), dim=-1)

    def sound_features(self, wave: Tensor) -> Tensor:
        """16 kHz sound [B, S] -> [B, F, dim], F = S // 640; every mel band standardised over the clip."""
        num_frames = wave.shape[1] // SAMPLES_PER_FRAME
        wave = F.pad(wave[:, : num_frames * SAMPLES_PER_FRAME], (_MEL_PAD, _MEL_PAD))
        x = self.mel(wave)
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True).clamp(min=0.05)
        for conv in self.sound_stem:
            x = F.silu(conv(x))
        for turn in self.sound_turns:
            x = turn(x)
        return x.transpose(1, 2)

    def sound_points(self, features: Tensor) -> Tensor:
        """[B, F, dim] -> [B, F - 4, EMBEDDING]: point i belongs to frames i .. i + 4, as a video window does."""
        middle = features[:, WINDOW // 2 : features.shape[1] - WINDOW // 2]
        return F.normalize(self.sound_out(middle).float(), dim=-1)
