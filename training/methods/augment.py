"""Random damage to sound and pictures, batched, drawn from one generator: what microphones and cameras do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """fp32 numbers spread evenly over low..high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def draw(count: int, generator: torch.Generator) -> int:
    """A number below ``count``."""
    return int(torch.randint(count, (), generator=generator))


def some(count: int, share: float, generator: torch.Generator) -> Tensor:
    """bool [count], true for about ``share`` of them."""
    return torch.rand(count, generator=generator) < share


def level_speech(wave: Tensor, level_db: float = -16.0) -> Tensor:
    """[B, S] -> the same with its sounding parts at ``level_db`` (mean power over frames no 10 dB below the mean)."""
    num_frames = max(wave.shape[-1] // SAMPLES_PER_FRAME, 1)
    power = wave[..., : num_frames * SAMPLES_PER_FRAME].unflatten(-1, (num_frames, -1)).square().mean(-1)
    loud = power > 0.1 * power.mean(-1, keepdim=True)
    active = (power * loud).sum(-1, keepdim=True) / loud.sum(-1, keepdim=True).clamp(min=1)
    return wave * (10 ** (level_db / 20) / active.sqrt().clamp(min=1e-4))


def change_speed(wave: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Play each row faster (factor > 1) or slower, pitch and all, in the same number of samples.

    Returns: wave [B, S], and position [B, F] of each new frame among the old ones, in frames (beyond the end: silence).
    """
    s = wave.shape[1]
    at = torch.arange(s)[None] * factors[:, None]
    index = at.long()
    padded = F.pad(wave, (0, 2))
    near, far = (padded.gather(1, (index + i).clamp(max=s + 1)) for i in (0, 1))
    frames = (torch.arange(s // SAMPLES_PER_FRAME)[None] + 0.5) * factors[:, None] - 0.5
    return torch.lerp(near, far, at - index), frames


def damage_speech(wave: Tensor, generator: torch.Generator) -> Tensor:
    """[B, S] levelled speech -> echo, equaliser, band limits, noise, babble of the batch's other rows, gain."""
    b, s = wave.shape
    clean = wave
    size = 1 << (s + SAMPLE_RATE // 2).bit_length()
    spectrum = torch.fft.rfft(wave, n=size) * _random_filters(b, size, generator)
    spectrum = torch.where(some(b, 0.4, generator)[:, None], spectrum * _random_rooms(b, size, generator), spectrum)
    wave = level_speech(torch.fft.irfft(spectrum, n=size)[:, :s])
    noise_db = torch.where(some(b, 0.7, generator)[:, None], uniform((b, 1), -45, -24, generator), -90.0)
    babble_db = torch.where(some(b, 0.2, generator)[:, None], uniform((b, 1), -26, -14, generator), -90.0)
    wave = wave * _drop_outs(b, s, generator)
    wave = wave + 10 ** (noise_db / 20) * _coloured_noise(b, s, generator)
    wave = wave + 10 ** (babble_db / 20) * clean.roll(1, 0).flip(-1)  # backwards speech says nothing
    return wave * 10 ** (uniform((b, 1), -6, 5, generator) / 20)


def _random_filters(b: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth gains within 12 dB, some cut like a telephone, some with two bands missing: [b, size // 2 + 1]."""
    bins = size // 2 + 1
    knots = uniform((b, 1, 9), -12, 12, generator) * uniform((b, 1, 1), 0, 1, generator)
    gain_db = F.interpolate(knots, size=bins, mode="linear", align_corners=True)[:, 0]
    hertz = torch.linspace(0, SAMPLE_RATE / 2, bins)[None]
    low = torch.where(some(b, 0.3, generator), uniform((b,), 50, 350, generator), 0.0)[:, None]
    high = torch.where(some(b, 0.3, generator), uniform((b,), 3000, 7500, generator), 1e5)[:, None]
    notch = uniform((b, 2, 1), 0, SAMPLE_RATE / 2, generator)  # so that no narrow band alone decides
    missed = (hertz[:, None] - notch).abs() < uniform((b, 2, 1), 0, 450, generator)
    gain_db = gain_db - 40 * (missed.any(1) & some(b, 0.5, generator)[:, None])
    gain_db = gain_db - 12 * (low / hertz.clamp(min=1)).log2().clamp(0, 4) - 12 * (hertz / high).log2().clamp(0, 4)
    return 10 ** (gain_db / 20)


def _drop_outs(b: int, s: int, generator: torch.Generator) -> Tensor:
    """Gain that goes to zero for two spans of up to 80 ms in half of the rows: [b, s]."""
    middle = uniform((b, 2, 1), 0, s, generator)
    half = uniform((b, 2, 1), 0, 0.04 * SAMPLE_RATE, generator) * some(b, 0.5, generator).view(b, 1, 1)
    return 1.0 - ((torch.arange(s) - middle).abs() < half).any(1).float()


def _random_rooms(b: int, size: int, generator: torch.Generator) -> Tensor:
    """Spectra of rooms: the direct sound, then noise that dies away in 0.1 to 0.5 s. [b, size // 2 + 1]."""
    length = SAMPLE_RATE // 2
    seconds = torch.arange(length) / SAMPLE_RATE
    decay = torch.exp(-6.9 * seconds / uniform((b, 1), 0.1, 0.5, generator))
    tail = torch.randn((b, length), generator=generator) * decay
    tail = tail / tail.square().sum(-1, keepdim=True).sqrt() * uniform((b, 1), 0.1, 0.7, generator)
    tail[:, 0] = 1.0
    return torch.fft.rfft(tail, n=size)


def _coloured_noise(b: int, s: int, generator: torch.Generator) -> Tensor:
    """Noise of unit power between white and red: [b, s]."""
    spectrum = torch.fft.rfft(torch.randn((b, s), generator=generator))
    slope = uniform((b, 1), 0, 1, generator)
    hertz = torch.linspace(1, SAMPLE_RATE / 2, spectrum.shape[-1])[None].clamp(min=50)
    noise = torch.fft.irfft(spectrum * hertz**-slope, n=s)
    return noise / noise.square().mean(-1, keepdim=True).sqrt()


def move_pictures(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Shift by up to 8 % and zoom by up to 12 %. [B, 3, H, W] -> pictures, shift [B, 2] in widths, zoom [B]."""
    b = pictures.shape[0]
    shift = uniform((b, 2), -0.08, 0.08, generator)
    zoom = torch.exp(uniform((b,), -0.12, 0.12, generator))
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = -2 * shift / zoom[:, None]  # the grid runs over -1..1, hence twice the shift
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False), shift, zoom


def damage_pictures(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, H, W] in -1..1 -> other colours, blur, block compression, noise, a small patch covered; clamped."""
    b = pictures.shape[0]
    x = pictures * uniform((b, 3, 1, 1), 0.85, 1.15, generator) + uniform((b, 3, 1, 1), -0.08, 0.08, generator)
    x = x * uniform((b, 1, 1, 1), 0.6, 1.3, generator) + uniform((b, 1, 1, 1), -0.3, 0.3, generator)
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, uniform((b, 1, 1, 1), 0.2, 1.3, generator))
    x = torch.where(some(b, 0.4, generator).view(b, 1, 1, 1), _blur(x, generator), x)
    x = torch.where(some(b, 0.4, generator).view(b, 1, 1, 1), _quantise_blocks(x, generator), x)
    x = x + torch.randn(x.shape, generator=generator) * uniform((b, 1, 1, 1), 0, 0.08, generator)
    return _cover(x, generator).clamp(-1, 1)


def _blur(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of 0.3 to 1.3 pixels, one width per picture."""
    b, c, h, w = x.shape
    at = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (at[None] / uniform((b, 1), 0.3, 1.3, generator)) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(c, 0)
    flat = F.pad(x.reshape(1, b * c, h, w), (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=b * c)
    return F.conv2d(flat, kernel[:, None, None, :], groups=b * c).reshape(b, c, h, w)


def _quantise_blocks(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round the cosine coefficients of 8 x 8 blocks, higher frequencies more coarsely, as picture codecs do."""
    b, c, h, w = x.shape
    k = torch.arange(8)
    basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) * 0.5
    basis[0] *= math.sqrt(0.5)
    blocks = x.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    step = uniform((b, 1, 1, 1, 1, 1), 0.02, 0.12, generator) * (1 + 0.5 * (k[:, None] + k[None]))
    blocks = basis.T @ (torch.round(coefficients / step) * step) @ basis
    return blocks.transpose(3, 4).reshape(b, c, h, w)


def _cover(x: Tensor, generator: torch.Generator) -> Tensor:
    """Paint one grey rectangle, up to a sixth of each side, over a fifth of the pictures."""
    b, _, h, w = x.shape
    size = uniform((b, 2), 0.05, 0.17, generator) * some(b, 0.2, generator)[:, None]
    start = uniform((b, 2), 0, 0.9, generator)
    rows, columns = torch.arange(h)[None] / h, torch.arange(w)[None] / w
    tall = (rows >= start[:, :1]) & (rows < start[:, :1] + size[:, :1])
    wide = (columns >= start[:, 1:]) & (columns < start[:, 1:] + size[:, 1:])
    shade = uniform((b, 1, 1, 1), -1, 1, generator)
    return torch.where((tall[:, :, None] & wide[:, None])[:, None], shade, x)
