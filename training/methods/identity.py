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
from training.rewards.identity import IdentityNet, crop_faces

SCALE, ANGLE_MARGIN = 24.0, 0.2


class IdentityMethod:
    """Classification of the people with an additive cosine margin (arXiv 1801.05599) on damaged crops."""

    def __init__(self, train: Any, val: Any, *, batch: int = 64) -> None:
        self.train, self.val, self.batch = train, val, batch
        self.people = {int(who): i for i, who in enumerate(sorted(set(train.identity.tolist())))}
        self.module = nn.ModuleDict({"net": IdentityNet(), "people": nn.Embedding(len(self.people), 64)})

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames, boxes, who = [], [], []
        for clip in torch.randint(len(self.train), (self.batch,), generator=generator).tolist():
            at = int(torch.randint(self.train.num_frames, (), generator=generator))
            frames.append(self.train.frames(clip, at, 1)[0])
            boxes.append(self.train.facebox(clip, at, 1)[0])
            who.append(self.people[int(self.train.identity[clip])])
        faces, _, _ = augment.move_pictures(_faces(frames, boxes), generator)
        faces = torch.where(augment.some(self.batch, 0.5, generator).view(-1, 1, 1, 1), faces.flip(-1), faces)
        faces = augment.damage_pictures(faces, generator)
        cosine = self.module["net"](faces).float() @ F.normalize(self.module["people"].weight.float(), dim=-1).T
        who = torch.tensor(who)
        logits = SCALE * (cosine - ANGLE_MARGIN * F.one_hot(who, len(self.people)))
        return {"loss": F.cross_entropy(logits, who), "right": (cosine.argmax(1) == who).float().mean()}

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
    pictures = torch.from_numpy(np.stack(list(frames)).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    return crop_faces(pictures, torch.from_numpy(np.stack(list(boxes)).astype(np.float32)))
