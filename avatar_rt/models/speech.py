"""Speech encoder: 16 kHz sound in, features at the video's 25 Hz out, with a short and fixed view in time."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME, SpeechConfig
from avatar_rt.errors import InputError

MOUTH_COEFFICIENTS: tuple[str, ...] = (
    "jawOpen", "mouthClose", "mouthFunnel", "mouthPucker", "mouthRollLower", "mouthRollUpper",
    "mouthPressLeft", "mouthStretchLeft", "mouthLowerDownLeft", "mouthUpperUpLeft",
)  # fmt: skip
"""ARKit coefficients that the mouth head regresses, after the geometric lip opening (its channel 0)."""

_FFT, _WINDOW, _HOP = 512, 400, 160
_STEM_MARGIN = 760  # samples beyond a frame's own 640 that the window and the stem see on each side
# (past, future) frames that each block looks at; more past than future, because what lies ahead has to be waited for.
_SPANS = ((1, 1), (2, 1), (2, 1), (2, 0))


def mel_filters(num_mels: int) -> Tensor:
    """Triangular filters, evenly spaced in mel from 0 to 8 kHz: [257, num_mels], columns sum to 1."""
    top = 2595.0 * math.log10(1 + SAMPLE_RATE / 2 / 700.0)
    mel = torch.linspace(0.0, top, num_mels + 2, dtype=torch.float64)
    edges = 700.0 * (10 ** (mel / 2595.0) - 1)
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    rise, fall = (bins - low) / (mid - low), (high - bins) / (high - mid)
    # The lowest triangles are narrower than a bin; the floor keeps each from missing all of them.
    filters = torch.minimum(rise, fall).clamp(min=0) + 1e-3 * ((bins - mid).abs() < SAMPLE_RATE / _FFT)
    return (filters / filters.sum(0)).float()


class LogMel(nn.Module):
    """Log-mel spectrogram at 100 Hz with fixed compression, so it can be computed piece by piece."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW))
        self.register_buffer("filters", mel_filters(num_mels))

    def forward(self, wave: Tensor) -> Tensor:
        """[B, S] -> [B, num_mels, (S - 400) // 160 + 1] fp32, about -2..2 for speech at -16 LUFS; no padding."""
        windows = wave.float().unfold(-1, _WINDOW, _HOP) * self.window.float()
        power = torch.fft.rfft(windows, n=_FFT).abs().square()
        with torch.autocast(wave.device.type, enabled=False):
            mel = power @ self.filters.float()
        return (torch.log(mel + 1e-4) * 0.25).transpose(1, 2)


class _Block(nn.Module):
    """Residual block that looks ``past`` and ``future`` frames around; its output is that much shorter."""

    def __init__(self, dim: int, past: int, future: int) -> None:
        super().__init__()
        self.past, self.future = past, future
        self.norm = nn.LayerNorm(dim)
        self.widen = nn.Conv1d(dim, 2 * dim, past + future + 1)
        self.narrow = nn.Conv1d(2 * dim, dim, 1)

    def forward(self, x_BCL: Tensor) -> Tensor:
        h = self.norm(x_BCL.transpose(1, 2)).transpose(1, 2)
        h = self.narrow(F.gelu(self.widen(h)))
        return x_BCL[..., self.past : x_BCL.shape[-1] - self.future] + h


class SpeechEncoder(nn.Module):
    """Sound -> features [dim] per video frame, each of unit scale.

    Feature i belongs to samples 640 i .. 640 i + 639. It depends on those, on ``context[0]`` samples before and on
    ``context[1]`` after them and on nothing else: 5240 and 2680 with four layers, which is 8.2 frames back and
    4.2 frames ahead. What lies outside the waveform counts as digital silence. All padding happens on the waveform,
    so a piece with its context gives the same features as the whole.

    ``heads`` reads phonemes and the mouth off the features; only training and measurement use it.
    """

    def __init__(self, cfg: SpeechConfig) -> None:
        super().__init__()
        self.cfg = cfg
        h = cfg.hidden_dim
        spans = [_SPANS[i % len(_SPANS)] for i in range(cfg.num_layers)]
        self.mel = LogMel(cfg.num_mels)
        self.scale = nn.Parameter(torch.ones(cfg.num_mels))
        self.shift = nn.Parameter(torch.zeros(cfg.num_mels))
        self.stem = nn.ModuleList(
            (nn.Conv1d(cfg.num_mels, h, 3), nn.Conv1d(h, h, 4, stride=2), nn.Conv1d(h, h, 4, stride=2))
        )
        self.blocks = nn.ModuleList(_Block(h, past, future) for past, future in spans)
        self.out = nn.Linear(h, cfg.dim)
        self.phoneme_head = nn.Linear(cfg.dim, cfg.num_phonemes)
        self.mouth_head = nn.Linear(cfg.dim, 1 + len(MOUTH_COEFFICIENTS))
        self.register_buffer("mouth_mean", torch.zeros(1 + len(MOUTH_COEFFICIENTS)))
        self.register_buffer("mouth_std", torch.ones(1 + len(MOUTH_COEFFICIENTS)))
        past, future = (sum(side) for side in zip(*spans, strict=True)) if spans else (0, 0)
        self.context = (past * SAMPLES_PER_FRAME + _STEM_MARGIN, future * SAMPLES_PER_FRAME + _STEM_MARGIN)

    def forward(self, wave: Tensor, *, has_context: bool = False) -> Tensor:
        """Features of a waveform.

        Args:
            wave: [B, S] 16 kHz in -1..1, loudness-normalised to -16 LUFS.
            has_context: The waveform already carries ``context`` samples on both sides (a piece of a stream, or
                silence), which get no features of their own; else silence is put there.

        Returns: [B, F, dim] fp32, F = S // 640 without context, (S - sum(context)) // 640 with it.
        Raises: InputError on another shape, or on less than one frame of sound.
        """
        left, right = self.context
        extra = left + right if has_context else 0
        if wave.ndim != 2 or wave.shape[1] < SAMPLES_PER_FRAME + extra:
            expected = f"[B, at least {SAMPLES_PER_FRAME + extra} samples]"
            raise InputError(f"wave: expected {expected}, got {list(wave.shape)}")
        num_frames = (wave.shape[1] - extra) // SAMPLES_PER_FRAME
        if not has_context:
            wave = F.pad(wave, (left, right))
        wave = wave[:, : num_frames * SAMPLES_PER_FRAME + left + right]
        x = self.mel(wave) * self.scale.float()[:, None] + self.shift.float()[:, None]
        x = x.to(self.out.weight.dtype)
        for conv in self.stem:
            x = F.gelu(conv(x))
        for block in self.blocks:
            x = block(x)
        features = self.out(x.transpose(1, 2)).float()
        return F.layer_norm(features, (self.cfg.dim,))

    def heads(self, features: Tensor) -> dict[str, Tensor]:
        """[B, F, dim] -> ``phonemes`` logits [B, F, num_phonemes] and ``mouth`` [B, F, 11] (see MOUTH_COEFFICIENTS)."""
        features = features.to(self.phoneme_head.weight.dtype)
        mouth = self.mouth_head(features).float() * self.mouth_std.float() + self.mouth_mean.float()
        return {"phonemes": self.phoneme_head(features).float(), "mouth": mouth}
