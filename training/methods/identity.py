"""Training of the identity networks, of pictures and of latents: which of the corpus' people is it, in any scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.models.weights import save_weights
from training.methods import augment
from training.methods.augment import draw
from training.methods.encoders import to_pictures
from training.rewards.identity import IdentityNet, LatentIdentityNet, crop_faces

TEMPERATURE = 0.1


class IdentityMethod:
    """A face finds the same person's face from another scene among all of the batch."""

    def __init__(self, train: Any, val: Any, *, people: int = 48) -> None:
        self.train, self.val, self.people = train, val, people
        self.module = nn.ModuleDict({"net": IdentityNet()})
        self.paired = torch.tensor([c for c in range(len(train)) if train.siblings(c)])

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        first = self.paired[torch.randint(len(self.paired), (self.people,), generator=generator)].tolist()
        second = [self.train.siblings(c)[draw(len(self.train.siblings(c)), generator)] for c in first]
        frames, boxes = [], []
        for clip in first + second:
            at = draw(self.train.num_frames, generator)
            frames.append(self.train.frames(clip, at, 1)[0])
            boxes.append(self.train.facebox(clip, at, 1)[0])
        faces, _, _ = augment.move_pictures(_faces(frames, boxes), generator)
        gain = augment.uniform((len(faces), 3, 1, 1), 0.92, 1.08, generator)
        faces = faces * gain * augment.uniform((len(faces), 1, 1, 1), 0.8, 1.2, generator)
        faces = torch.where(augment.some(len(faces), 0.5, generator).view(-1, 1, 1, 1), faces.flip(-1), faces)
        return contrast(self.module["net"](faces.clamp(-1, 1)), torch.from_numpy(self.train.identity[first]))

    @torch.no_grad()
    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Held-out people: does a clip find its sibling among all of them, by the mean of eight frames?"""
        clips = [c for c in range(len(self.val)) if self.val.siblings(c)]
        mean = []
        for clip in clips:
            at = np.linspace(0, self.val.num_frames - 1, 8).astype(int)
            frames, boxes = self.val.frames(clip), self.val.facebox(clip)
            mean.append(F.normalize(self.module["net"](_faces(frames[at], boxes[at])).float().mean(0), dim=0))
        return found(torch.stack(mean), [[clips.index(s) for s in self.val.siblings(c)] for c in clips])

    def export(self, out: Path) -> None:
        save_weights(self.module["net"], out / "identity.safetensors", dtype=torch.bfloat16)


class LatentIdentityMethod:
    """A latent finds a latent of the same person in another scene among all of the batch.

    Latents are moved by a cell, scaled and shifted per channel, and noised: what the losses will show the network are
    estimates, not latents of any clip.
    """

    def __init__(self, table: Any, *, people: int = 48, noise: float = 0.35) -> None:
        self.table, self.people, self.noise = table, people, noise
        self.module = nn.ModuleDict({"net": LatentIdentityNet(table.latents.shape[2])})
        self.identity = torch.tensor([m["identity"] for m in table.meta])

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        table, g = self.table, generator
        first = table.train[torch.randint(len(table.train), (self.people,), generator=g)]
        second = [table.siblings[c][draw(len(table.siblings[c]), g)] for c in first.tolist()]
        clips = torch.cat([first, torch.tensor(second)])
        x = table.latents[clips, torch.randint(1, table.latents.shape[1], (len(clips),), generator=g)].float()
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        down, right = torch.randint(3, (2, len(x), 1), generator=g)
        rows, columns = (torch.arange(n - 2) + by for n, by in ((x.shape[2], down), (x.shape[3], right)))
        x = x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        level = torch.randn(2, len(x), x.shape[1], 1, 1, generator=g) * 0.15
        x = x * (1 + level[0]) + level[1]
        x = x + self.noise * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        return contrast(self.module["net"](x), self.identity[first])

    @torch.no_grad()
    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Held-out people: does a clip find its sibling among all of them, by the mean over its latents?"""
        clips = self.table.val.tolist()
        mean = torch.stack([self.module["net"](self.table.latents[c, 1:].float()).float().mean(0) for c in clips])
        return found(F.normalize(mean, dim=1), [[clips.index(s) for s in self.table.siblings[c]] for c in clips])

    def export(self, out: Path) -> None:
        save_weights(self.module["net"], out / "latent_identity.safetensors", dtype=torch.bfloat16)


def contrast(embeddings: Tensor, who: Tensor) -> dict[str, Tensor]:
    """The contrastive loss (arXiv 1807.03748) of unit embeddings [2 P, D]: rows i and P + i show person ``who[i]``."""
    a, b = embeddings.float().chunk(2)
    same = (who[:, None] == who[None]).fill_diagonal_(False)
    alike = (a @ b.T / TEMPERATURE).masked_fill(same, -1e4)  # a person drawn twice is not another person
    target = torch.arange(len(who))
    loss = (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2
    right = (alike.argmax(1) == target).float().mean()
    return {"loss": loss, "right": right, "samples": torch.tensor(float(len(embeddings)))}


def found(embeddings: Tensor, siblings: list[list[int]]) -> dict[str, float]:
    """Share of unit embeddings [n, D] whose nearest other is one of their ``siblings``."""
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1).tolist()
    hits = [at in rows for at, rows in zip(nearest, siblings, strict=True)]
    return {"top1": float(np.mean(hits)), "clips": float(len(siblings))}


def _faces(frames: Any, boxes: Any) -> Tensor:
    return crop_faces(to_pictures(np.stack(list(frames))), torch.from_numpy(np.stack(list(boxes)).astype(np.float32)))
