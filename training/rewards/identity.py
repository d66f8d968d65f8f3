"""Small face-identity networks of our own, of pictures and of latents: perceptual loss of the VAE's decoder, identity
and likeness losses of the transformer.

They never score results: ``bench.quality`` embeds faces with a network that saw none of this corpus.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 80  # side of a face crop in pixels
MARGIN = 1.25  # side of the crop over the height of the face box, hairline to chin


class _Net(nn.Module):
    """Maps at ever lower resolution, then a unit embedding."""

    def __init__(self, channels: int, widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(_Level(a, b) for a, b in zip(widths[:1] + widths, widths, strict=False))
        self.out = nn.Linear(widths[-1], dim)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map after each level, each half as high and wide as the one before."""
        x, maps = self.stem(x), []
        for i, level in enumerate(self.levels):
            x = level(F.avg_pool2d(x, 2) if i else x)
            maps.append(x)
        return maps

    def embed(self, last: Tensor) -> Tensor:
        """Unit embedding [B, dim] from the last map."""
        return F.normalize(self.out(F.silu(last).mean((2, 3)).float()), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.features(x)[-1])


class IdentityNet(_Net):
    """Face crops [B, 3, 80, 80] in -1..1 -> unit embeddings [B, 64]; its inner maps ([B, 32, 40, 40], [B, 64, 20, 20],
    [B, 128, 10, 10], [B, 128, 5, 5]) serve as perceptual features."""

    def __init__(self, base: int = 32, dim: int = 64) -> None:
        super().__init__(12, (base, 2 * base, 4 * base, 4 * base), dim)

    def features(self, faces: Tensor) -> list[Tensor]:
        return super().features(F.pixel_unshuffle(faces, 2))


class LatentIdentityNet(_Net):
    """Latents of single frames [B, C, h, w], normalised -> unit embeddings [B, 64] of who is in them. What it sees need
    not be decoded, so a loss can look at every latent of a batch (as arXiv 2405.05967 takes LPIPS to latents)."""

    def __init__(self, channels: int = 16, base: int = 64, dim: int = 64) -> None:
        super().__init__(channels, (base, base * 3 // 2, 2 * base), dim)


class _Level(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


def crop_faces(frames: Tensor, boxes: Tensor) -> Tensor:
    """Square crops around faces, differentiable in the frames.

    frames: [B, 3, H, W]; boxes: [B, 4] x0 y0 x1 y1 in pixels, hairline to chin. Returns [B, 3, 80, 80].
    """
    h, w = frames.shape[-2:]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = MARGIN * (boxes[:, 3] - boxes[:, 1]) / 2
    theta = frames.new_zeros(len(frames), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 2 * half / w, 2 * half / h
    theta[:, 0, 2], theta[:, 1, 2] = 2 * centre[:, 0] / w - 1, 2 * centre[:, 1] / h - 1
    grid = F.affine_grid(theta, [len(frames), 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(frames, grid, align_corners=False, padding_mode="border")


def perceptual_distance(net: IdentityNet, made: Tensor, true: Tensor) -> Tensor:
    """How unlike two batches of crops look: the mean squared difference of their channel-normalised maps (the form of
    arXiv 1801.03924), averaged over levels, plus one minus the cosine of their embeddings."""
    with torch.no_grad():
        wanted = net.features(true)
        person = net.embed(wanted[-1])
    maps = net.features(made)
    total = (1 - (net.embed(maps[-1]) * person).sum(-1)).mean()
    for a, b in zip(maps, wanted, strict=True):
        a, b = (m.float() / m.float().square().mean(1, keepdim=True).add(1e-6).sqrt() for m in (a, b))
        total = total + (a - b).square().mean() / len(maps)
    return total
