"""Training of the identity network: which of the corpus' people is it, whatever the scene."""

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
from training.rewards.identity import IdentityNet, crop_faces

TEMPERATURE = 0.1


class IdentityMethod:
    """Contrast (arXiv 1807.03748): a face finds the same person's face from another scene among all of the batch."""

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
        a, b = self.module["net"](faces.clamp(-1, 1)).float().chunk(2)
        who = self.train.identity[first]
        same = torch.from_numpy(who[:, None] == who[None]).fill_diagonal_(False)
        alike = (a @ b.T / TEMPERATURE).masked_fill(same, -1e4)  # a person drawn twice is not another person
        target = torch.arange(len(first))
        loss = (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2
        return {"loss": loss, "right": (alike.argmax(1) == target).float().mean(), "samples": len(faces)}

    @torch.no_grad()
    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Held-out people: does a clip find its sibling among all of them, by the mean of eight frames?"""
        clips = [c for c in range(len(self.val)) if self.val.siblings(c)]
        mean = []
        for clip in clips:
            at = np.linspace(0, self.val.num_frames - 1, 8).astype(int)
            frames, boxes = self.val.frames(clip), self.val.facebox(clip)
            mean.append(F.normalize(self.module["net"](_faces(frames[at], boxes[at])).float().mean(0), dim=0))
        table = torch.stack(mean)
        similar = (table @ table.T).fill_diagonal_(-1)
        hits = [int(similar[i].argmax()) in {clips.index(s) for s in self.val.siblings(c)} for i, c in enumerate(clips)]
        return {"top1": float(np.mean(hits)), "clips": float(len(clips))}

    def export(self, out: Path) -> None:
        save_weights(self.module["net"], out / "identity.safetensors", dtype=torch.bfloat16)


def _faces(frames: Any, boxes: Any) -> Tensor:
    return crop_faces(to_pictures(np.stack(list(frames))), torch.from_numpy(np.stack(list(boxes)).astype(np.float32)))
