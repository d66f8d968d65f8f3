"""Batches of windows drawn from the encoded corpus: what is generated, what it hears, where it is, who it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import Cut, with_masks
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.weights import load_weights
from training.data.table import Table
from training.methods.flow import Bucket

KINDS = ("first", "free", "next")


@dataclass(frozen=True)
class Batch:
    """B windows of T latent frames, W in a row of each of P people (B = P W).

    Attributes:
        x: [B, C, T, h, w] normalised latents; motion: [B, T, M] normalised tokens.
        audio: [B, 4T, A] features of the driving speech, 4T - 3 where windows start a clip.
        given: bool [B, T], the latents that are not generated: clean, at t = 0, and out of every loss.
        anchor: [B, Cin, 1, h, w] the place, the conditioning picture or the clip's first latent, with its masks.
        weight: [B, 2, h, w] masks of face and mouth.
        clip, start: int64 [B], the row of the table and its first latent.
        ref: int64 [P], the row of the table that the reference is taken from.
        ref_latents, ref_audio, ref_motion, ref_weight: [P, Cin, R, h, w], [P, 4R, A], [P, R, M], [P, 2, h, w] of it.
        cut: Where ``x``, ``anchor`` and ``weight`` lie in the frames, as ``VideoRefDiT`` takes it; None: all of them.
    """

    x: Tensor
    motion: Tensor
    audio: Tensor
    given: Tensor
    anchor: Tensor
    weight: Tensor
    clip: Tensor
    start: Tensor
    ref: Tensor
    ref_latents: Tensor
    ref_audio: Tensor
    ref_motion: Tensor
    ref_weight: Tensor
    cut: Cut | None = None

    @property
    def windows(self) -> int:
        """Windows of each person."""
        return len(self.x) // len(self.ref)

    def to(self, device: torch.device) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cut"}
        return Batch(**{name: tensor.to(device) for name, tensor in tensors.items()}, cut=self.cut)

    def rolled(self, *names: str) -> Batch:
        """The same batch with some conditions given to the wrong window."""
        return dataclasses.replace(self, **{n: getattr(self, n).roll(1, 0) for n in names})


class Drawer:
    """Draws batches from a table.

    Args:
        table: ``training.data.table.Table``, or anything with its attributes.
        cfg: Sizes; the table's latents are its full resolution.
        reference_lengths: Latent frames of a reference, one drawn per batch; half of the batches take neighbouring
            frames, half frames from all over the clip.
        same_scene: Takes the reference from the window's own clip, frames outside of the window where it has any: an
            ablation, in which the model may copy the place and the light.
    """

    def __init__(
        self, table: Any, cfg: AvatarConfig, *, reference_lengths: tuple[int, ...] = (2, 4, 8), same_scene: bool = False
    ) -> None:
        self.table, self.cfg = table, cfg
        self.reference_lengths, self.same_scene = reference_lengths, same_scene
        self._scale: dict[int, Tensor] = {}

    def __call__(
        self, pool: Tensor, g: torch.Generator, bucket: Bucket, kind: str, alike: torch.Generator | None = None
    ) -> Batch:
        """A batch of one kind: "first" starts its clip, "free" starts anywhere with nothing carried over, "next"
        continues (and then holds more latents than the carried ones). ``alike`` draws the references' length."""
        assert kind in KINDS
        table, overlap = self.table, self.cfg.chunk.overlap
        total, per = table.latents.shape[1], self.cfg.dit.audio_per_latent
        frames = bucket.frames + (overlap if kind == "next" and bucket.frames <= overlap else 0)
        who = pool[torch.randint(len(pool), (bucket.people,), generator=g)]
        clip = who.repeat_interleave(bucket.windows)
        start = torch.zeros(len(clip), dtype=torch.long)
        if kind != "first":
            start = torch.randint(1, total - frames + 1, (len(clip),), generator=g)
        index = start[:, None] + torch.arange(frames)
        x = table.latents[clip[:, None], index].float().transpose(1, 2)
        audio = table.speech[clip[:, None], _sound_of(index, per).clamp(min=0)].float()
        given = torch.zeros(len(clip), frames, dtype=torch.bool)
        if kind == "next":
            given[:, :overlap] = True
            scene, keep = table.latents[clip, 0].float(), torch.ones(len(clip), *x.shape[-2:])
        else:
            pick = torch.randint(table.scenes.shape[1], (len(clip),), generator=g)
            scene, keep = table.scenes[clip, pick].float(), table.scene_masks[clip, pick].float()
        batch = Batch(
            x, table.motion[clip[:, None], index], audio[:, per - 1 :] if kind == "first" else audio, given,
            with_masks(scene[:, :, None], self.cfg.dit, keep[:, None, None], 0), table.weight[clip], clip, start,
            *self._reference(who, start[:: bucket.windows], frames, g, g if alike is None else alike),
        )  # fmt: skip
        if bucket.cut:
            batch = self.around_the_mouth(batch, bucket.cut, g if alike is None else alike)
        return self.smaller(batch, bucket.down) if bucket.down > 1 else batch

    def around_the_mouth(self, batch: Batch, side: int, g: torch.Generator) -> Batch:
        """The same windows, of whose frames nothing is left but a square of ``side`` latents with the mouth in it, at
        one of nine places that the whole batch has in common. The reference stays whole."""
        (height, width), (_, p, q) = batch.x.shape[-2:], self.cfg.dit.patch
        if side % p or side % q or side > min(height, width):
            raise InputError(f"cut: expected a multiple of {max(p, q)} up to {min(height, width)}, got {side}")
        mean = batch.weight[:, 1].mean(0)
        middle = [
            float((mean.sum(axis) * (torch.arange(n) + 0.5)).sum() / mean.sum().clamp(min=1e-6))
            for axis, n in ((1, height), (0, width))
        ]
        moved = torch.randint(-1, 2, (2,), generator=g).tolist()
        top, left = (
            min(max(round((m - side / 2) / step) + d, 0), (n - side) // step) * step
            for m, d, n, step in zip(middle, moved, (height, width), (p, q), strict=True)
        )
        cut = (top // p, left // q, height // p, width // q)
        parts = {n: self._part(getattr(batch, n), cut, side) for n in ("x", "anchor", "weight")}
        return dataclasses.replace(batch, **parts, cut=cut)

    def _part(self, whole: Tensor, cut: Cut, side: int) -> Tensor:
        """The square of ``side`` latents of [..., h, w] whose corner a cut names."""
        top, left = cut[0] * self.cfg.dit.patch[1], cut[1] * self.cfg.dit.patch[2]
        return whole[..., top : top + side, left : left + side]

    def _reference(
        self, who: Tensor, start: Tensor, frames: int, g: torch.Generator, alike: torch.Generator
    ) -> tuple[Tensor, ...]:
        table, per = self.table, self.cfg.dit.audio_per_latent
        total = table.latents.shape[1]
        length = self.reference_lengths[int(torch.randint(len(self.reference_lengths), (), generator=alike))]
        picks = [int(torch.randint(len(table.siblings[i]), (), generator=g)) for i in who.tolist()]
        ref = torch.tensor([table.siblings[i][p] for i, p in zip(who.tolist(), picks, strict=True)])
        if torch.rand((), generator=g) < 0.5:
            index = torch.randint(1, total - length + 1, (len(who), 1), generator=g) + torch.arange(length)
        else:
            index = 1 + torch.rand(len(who), total - 1, generator=g).argsort(1)[:, :length].sort(1).values
        if self.same_scene:
            ref, index = who, _outside(start, frames, total, length)
        latents = table.latents[ref[:, None], index].float().transpose(1, 2)
        sound = table.speech[ref[:, None], _sound_of(index, per)].float()
        latents = with_masks(latents, self.cfg.dit, 1, 0)
        return ref, latents, sound, table.motion[ref[:, None], index], table.weight[ref]

    def picture(self, batch: Batch, gap: int, share: float, g: torch.Generator) -> Batch:
        """The same batch, some of its windows with a picture of the person for a place: a latent of the same clip at
        least ``gap`` latents before or after the window, so that its mouth belongs to another sound."""
        total, frames = self.table.latents.shape[1], batch.x.shape[2]
        where = torch.arange(1, total)
        far = (where < batch.start[:, None] - gap) | (where >= batch.start[:, None] + frames + gap)
        chosen = (torch.rand(len(batch.clip), generator=g) < share) & far.any(1) & ~batch.given[:, 0]
        at = where[torch.multinomial(far.double() + 1e-12, 1, generator=g)[:, 0]]
        shown = self.table.latents[batch.clip, at].float()
        if batch.cut is not None:
            shown = self._part(shown, batch.cut, batch.x.shape[-1])
        picture = with_masks(shown[:, :, None], self.cfg.dit, 1, 0)
        mask = chosen.view(-1, 1, 1, 1, 1)
        return dataclasses.replace(batch, anchor=torch.where(mask, picture, batch.anchor))

    def smaller(self, batch: Batch, down: int) -> Batch:
        """The same windows at 1 / ``down`` of the resolution, with latents averaged over squares and brought back to
        the spread they had. Not quite the latents of a smaller picture: over clips of the corpus the two correlate
        at 0.7 (the VAE of ``tiny`` at 128 pixels). It is their layout and colours that a first training is after."""
        if down not in self._scale:
            some = self.table.latents[: 64 : 1 + len(self.table.latents) // 64].float().flatten(0, 1)
            self._scale[down] = some.std((0, 2, 3)) / F.avg_pool2d(some, down).std((0, 2, 3)).clamp(min=1e-3)
        scale, channels = self._scale[down].view(1, -1, 1, 1, 1), self.cfg.dit.latent_channels

        def pooled(v: Tensor) -> Tensor:
            v = F.avg_pool3d(v, (1, down, down))
            return torch.cat([v[:, :channels] * scale, v[:, channels:]], dim=1)

        return dataclasses.replace(
            batch, x=pooled(batch.x), anchor=pooled(batch.anchor), ref_latents=pooled(batch.ref_latents),
            weight=F.avg_pool2d(batch.weight, down), ref_weight=F.avg_pool2d(batch.ref_weight, down),
        )  # fmt: skip


def open_table(corpus: Path, cfg: AvatarConfig) -> Table:
    """The table of a corpus, its motion normalised by ``CORPUS/weights/motion.safetensors``."""
    motion = MotionEncoder(cfg.motion)
    load_weights(motion, corpus / "weights" / "motion.safetensors", dtype=torch.float32)
    return Table(corpus, motion, cfg.vae.spatial_stride, weights=corpus / "weights")


def _sound_of(index: Tensor, per: int) -> Tensor:
    """Latents [B, T] of a clip -> the video frames [B, per T] they hold; latent 0 holds the last of its slots."""
    return (index[:, :, None] * per - (per - 1) + torch.arange(per)).flatten(1)


def _outside(start: Tensor, frames: int, total: int, length: int) -> Tensor:
    """[P, length] latents that lie outside of windows, as near to them as there is room."""
    rows = []
    for first in start.tolist():
        free = [i for i in range(1, total) if not first <= i < first + frames] or list(range(1, total))
        free.sort(key=lambda i: (min(abs(i - first), abs(i - first - frames + 1)), i))
        rows.append(sorted((free * length)[:length]))
    return torch.tensor(rows)
