"""A small face-identity network of our own: perceptual loss of the VAE's decoder, identity loss of the transformer.

It never scores results: ``bench.quality`` embeds faces with a network that saw none of this corpus.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 80  # side of a face crop in pixels
MARGIN = 1.25  # side of the crop over the height of the face box, hairline to chin


class IdentityNet(nn.Module):
    """Face crops [B, 3, 80, 80] in -1..1 -> unit embeddings [B, 64]; its inner maps serve as perceptual features."""

    def __init__(self, base: int = 32, dim: int = 64) -> None:
        super().__init__()
        widths = (base, 2 * base, 4 * base, 4 * base)
        self.stem = nn.Conv2d(12, base, 3, padding=1)
        self.levels = nn.ModuleList()
        before = base
        for width in widths:
            self.levels.append(_Level(before, width))
            before = width
        self.out = nn.Linear(before, dim)

    def features(self, faces: Tensor) -> list[Tensor]:
        """The map after each level: [B, 32, 40, 40], [B, 64, 20, 20], [B, 128, 10, 10], [B, 128, 5, 5]."""
        x, maps = self.stem(F.pixel_unshuffle(faces, 2)), []
        for i, level in enumerate(self.levels):
            x = level(F.avg_pool2d(x, 2) if i else x)
            maps.append(x)
        return maps

    def embed(self, last: Tensor) -> Tensor:
        """Unit embedding [B, 64] from the last map."""
        return F.normalize(self.out(F.silu(last).mean((2, 3)).float()), dim=-1)

    def forward(self, faces: Tensor) -> Tensor:
        return self.embed(self.features(faces)[-1])


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
