"""Encoded clips for training: ``Table`` holds a small corpus in memory, ``Stream`` reads one that does not fit.

Both read the shards of training/data/shards.py and split them the same way: by identity, every twentieth held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from avatar_rt.errors import InputError
from avatar_rt.models.motion import MotionEncoder, group_motion
from training.data.corpus import VALIDATION_STRIDE
from training.data.shards import FOLDER, Sample, Shard, read_index, read_shard, siblings


class Table:
    """The encoded corpus in memory, N clips of F frames and T latent frames.

    Args:
        corpus: Folder with ``latents/`` (training.data.latents or training.data.prepare).
        motion: Its statistics normalise the motion.
        stride: Pixels per latent.
        weights: Folder of weights that the clips must have been encoded by; None takes any.

    Attributes:
        latents: fp16 [N, T, C, h, w]; speech: fp16 [N, F, A]; motion: fp32 [N, T, 4 * 62], normalised.
        scenes, scene_masks: fp16 [N, n, C, h, w] and bool [N, n, h, w].
        weight: fp32 [N, 2, h, w], soft masks of face and mouth.
        captions, keys, meta: one per clip.
        siblings: per clip, the clips of the same person in other scenes.
        train, val: int64, the clips that have a sibling, of training and of held-out identities.

    Raises: ArtifactError where there are no shards, a damaged one, or one encoded by other weights.
    """

    def __init__(self, corpus: Path, motion: MotionEncoder, stride: int, *, weights: Path | None = None) -> None:
        index = read_index(corpus / FOLDER, weights)
        samples = [s for shard in index.shards for s in read_shard(corpus / FOLDER, shard)]
        if not samples:
            raise InputError(f"{corpus / FOLDER}: expected encoded clips, the index names none")
        self.keys, self.meta = [s.key for s in samples], [s.meta for s in samples]
        self.latents, self.speech = _stack(samples, "latents"), _stack(samples, "speech")
        self.scenes, self.scene_masks = _stack(samples, "scenes"), _stack(samples, "scene_masks")
        self.motion = normalised_motion(_stack(samples, "motion"), motion)
        self.captions = [str(s.meta.get("caption", "")) for s in samples]
        self.weight = weight_maps(_stack(samples, "facebox"), self.latents.shape[-2], self.latents.shape[-1], stride)
        self.siblings = siblings(samples)
        held = torch.tensor([is_held_out(s.identity) for s in samples])
        paired = torch.tensor([bool(s) for s in self.siblings])
        self.train = torch.nonzero(paired & ~held).flatten()
        self.val = torch.nonzero(paired & held).flatten()


def is_held_out(identity: int) -> bool:
    return identity % VALIDATION_STRIDE == 0


def _stack(samples: list[Sample], name: str) -> Tensor:
    first = getattr(samples[0], name)
    out = np.empty((len(samples), *first.shape), first.dtype)
    for row, sample in zip(out, samples, strict=True):
        array = getattr(sample, name)
        if array.shape != first.shape:
            raise InputError(f"{sample.key}.{name}: expected {list(first.shape)} as {samples[0].key} has, got "
                             f"{list(array.shape)}; a Table holds clips of one size")  # fmt: skip
        row[...] = array
    return torch.from_numpy(out)


def normalised_motion(motion: Tensor, encoder: MotionEncoder) -> Tensor:
    """[N, F, 62] in natural units -> tokens [N, T, 4 * 62]; what lies beyond five deviations is an error of reading."""
    return group_motion(encoder.normalize(motion).clamp(-5, 5))


def weight_maps(facebox: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Face boxes [N, F, 4] in pixels -> masks [N, 2, height, width] in latents (face, mouth), from each mean box."""
    x0, y0, x1, y1 = (facebox.mean(1) / stride).unbind(1)

    def inside(size: int, low: Tensor, high: Tensor) -> Tensor:
        grid = torch.arange(size) + 0.5
        return ((grid[None] > (low - 0.5)[:, None]) & (grid[None] < (high + 0.5)[:, None])).float()

    h, w = y1 - y0, x1 - x0
    face = inside(height, y0, y1)[:, :, None] * inside(width, x0, x1)[:, None]
    lips = inside(height, y0 + 0.62 * h, y0 + 0.92 * h)[:, :, None]
    mouth = lips * inside(width, x0 + 0.28 * w, x1 - 0.28 * w)[:, None]
    return torch.stack([face, mouth], dim=1)


@dataclass(frozen=True)
class Pair:
    """A clip to generate, and a clip of the same person in another scene to refer to."""

    clip: Sample
    reference: Sample


class Stream(IterableDataset[list[Pair]]):
    """Batches of pairs, read shard by shard, without end; for a ``DataLoader(stream, batch_size=None)``.

    An epoch shuffles the shards, deals them out over ranks and workers, and reads ``mix`` at a time, shuffling their
    clips. Each clip that has a sibling in its shard comes once an epoch, with a sibling drawn for it. The order follows
    from the arguments alone: to resume, pass the number of batches this rank has taken as ``position``; shards that lie
    before it are not read again.

    Args:
        corpus: Folder with ``latents/``.
        batch: Pairs of a batch; the last of an epoch is filled from the next.
        split: "train" or "val".
        rank, world: This process among those that train together.
        workers: The DataLoader's ``num_workers``; 0 reads in this process.
        position: Batches that this rank has taken already.
        mix: Shards held in memory at once.
        weights: Folder of weights that the clips must have been encoded by; None takes any.

    Raises: InputError where there are fewer shards than readers, or no pair; ArtifactError as ``read_index`` and
        ``read_shard``.
    """

    def __init__(self, corpus: Path, batch: int, *, split: str = "train", seed: int = 0, rank: int = 0, world: int = 1,
                 workers: int = 0, position: int = 0, mix: int = 4, weights: Path | None = None) -> None:  # fmt: skip
        if split not in ("train", "val"):
            raise InputError(f"split: expected train or val, got {split!r}")
        self.folder, self.batch, self.seed, self.mix, self.position = corpus / FOLDER, batch, seed, mix, position
        self.rank, self.world, self.workers = rank, world, workers
        self.held = split == "val"
        self.shards = [s for s in read_index(self.folder, weights).shards if self._rows(s)]
        readers = world * max(workers, 1)
        if len(self.shards) < readers:
            raise InputError(
                f"{self.folder}: expected at least {readers} shards with {split} pairs, one per rank and worker, got "
                f"{len(self.shards)}"
            )

    def _rows(self, shard: Shard) -> list[int]:
        """Rows of this split that have a sibling."""
        who, paired = shard.identities, shard.paired
        return [i for i in range(len(who)) if paired[i] and is_held_out(who[i]) == self.held]

    def __iter__(self) -> Iterator[list[Pair]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if workers != max(self.workers, 1):
            raise InputError(f"workers: expected {self.workers} as the stream was told, got a DataLoader of {workers}")
        ahead = max(0, -(-(self.position - worker) // workers))  # of this worker's batches, taken before
        pairs = self._pairs(worker, workers, ahead * self.batch)
        while True:
            yield [next(pairs) for _ in range(self.batch)]

    def _pairs(self, worker: int, workers: int, skip: int) -> Iterator[Pair]:
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            mine = order[self.rank * workers + worker :: self.world * workers]
            for first in range(0, len(mine), self.mix):
                group = [self.shards[k] for k in mine[first : first + self.mix]]
                count = sum(len(self._rows(s)) for s in group)
                if skip >= count:
                    skip -= count
                    continue
                yield from self._mixed(group, epoch, skip)
                skip = 0
            epoch += 1

    def _mixed(self, group: list[Shard], epoch: int, skip: int) -> Iterator[Pair]:
        """The pairs of some shards in a random order that the shards' names and the epoch decide."""
        rng = np.random.default_rng([self.seed, epoch, *(int.from_bytes(s.name.encode()[-12:]) for s in group)])
        samples = [list(read_shard(self.folder, s)) for s in group]
        others = [siblings(s) for s in samples]
        rows = [(k, i) for k, shard in enumerate(group) for i in self._rows(shard)]
        draws = rng.random(len(rows))
        for n in rng.permutation(len(rows))[skip:]:
            k, i = rows[n]
            choice = others[k][i]
            yield Pair(samples[k][i], samples[k][choice[int(draws[n] * len(choice))]])


def collate(pairs: list[Pair]) -> dict[str, Any]:
    """A batch of pairs as tensors: each array of a sample under its name, the reference's under ``ref_<name>``."""
    out: dict[str, Any] = {"captions": [str(p.clip.meta.get("caption", "")) for p in pairs]}
    for prefix, samples in (("", [p.clip for p in pairs]), ("ref_", [p.reference for p in pairs])):
        for name in samples[0].arrays():
            out[prefix + name] = _stack(samples, name)
    return out
