"""The encoded corpus in memory, as the transformer's methods draw from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from avatar_rt.models.motion import MotionEncoder, group_motion


class Table:
    """The encoded corpus (``training.data.latents``), split by identity: every twentieth is held out."""

    def __init__(self, corpus: Path, motion: MotionEncoder, stride: int) -> None:
        rows = load_file(corpus / "latents.safetensors")
        self.latents, self.speech = rows["latents"], rows["speech"]
        self.scenes, self.scene_masks = rows["scenes"], rows["scene_masks"]
        self.motion = group_motion(motion.normalize(rows["motion"]).clamp(-5, 5))
        self.captions = json.loads((corpus / "captions.json").read_text())
        self.weight = _weight_maps(rows["facebox"], self.latents.shape[-1], stride)
        identity = rows["identity"]
        members: dict[int, list[int]] = {}
        for i, who in enumerate(identity.tolist()):
            members.setdefault(who, []).append(i)
        self.siblings = [[j for j in members[who] if j != i] for i, who in enumerate(identity.tolist())]
        paired = torch.tensor([bool(s) for s in self.siblings])
        self.train = torch.nonzero(paired & (identity % 20 != 0)).flatten()
        self.val = torch.nonzero(paired & (identity % 20 == 0)).flatten()


def _weight_maps(facebox: Tensor, size: int, stride: int) -> Tensor:
    """Face boxes [N, F, 4] in pixels -> soft masks [N, 2, size, size] (face, mouth), one per clip from its mean box."""
    pixels = stride * size
    x0, y0, x1, y1 = (facebox.mean(1) / pixels * size).unbind(1)
    grid = torch.arange(size) + 0.5

    def inside(low: Tensor, high: Tensor) -> Tensor:
        return ((grid[None] > (low - 0.5)[:, None]) & (grid[None] < (high + 0.5)[:, None])).float()

    h, w = y1 - y0, x1 - x0
    face = inside(y0, y1)[:, :, None] * inside(x0, x1)[:, None]
    mouth = inside(y0 + 0.62 * h, y0 + 0.92 * h)[:, :, None] * inside(x0 + 0.28 * w, x1 - 0.28 * w)[:, None]
    return torch.stack([face, mouth], dim=1)
