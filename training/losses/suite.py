"""Losses on the decoded face: which, from when, up to what noise, and of how few frames.

The estimate of the clean latents that a velocity implies is decoded through the frozen VAE; what is lost there is what
people look at and a mean over latents does not see. Of a batch only ``samples`` windows and ``latents`` consecutive
latents of each are decoded, for decoding costs more than the transformer's step. Each loss has a weight, a step from
which it rises linearly to it, and a time beyond which the estimate says nothing and the loss is off: 1[t < t_max].

The frozen networks are the identity network of ``training.rewards.identity``, the motion encoder and the speech
encoder's own mouth reading. The lip-sync network and the face embedder of ``bench.quality`` are in none of them: what
scores is never what is trained on. (The motion encoder reads ``mouth_r`` in ``bench.quality``: where ``motion`` or
``sync`` is on, trust ``lse_c_star`` and ``offset_star`` rather than that.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights
from training.losses.face import identity, perceptual, temporal
from training.losses.motion import motion_fidelity, sync
from training.methods.flow import data_of
from training.rewards.identity import IdentityNet, crop_faces

NAMES = ("identity", "perceptual", "temporal", "motion", "sync")


@dataclass(frozen=True)
class Term:
    """One auxiliary loss: its weight, the step at which it begins, the steps over which it rises, its largest time."""

    weight: float
    start: int = 0
    warmup: int = 200
    t_max: float = 0.55

    def at(self, step: int) -> float:
        """Its weight at a step: 0 up to ``start``, the whole from ``start + warmup`` on, linear between."""
        return self.weight * min(max((step - self.start) / max(self.warmup, 1), 0.0), 1.0)

    def gate(self, t: Tensor) -> Tensor:
        """1.0 where the estimate is worth looking at, 0.0 elsewhere."""
        return (t < self.t_max).float()


@dataclass(frozen=True)
class View:
    """What the losses see of n windows, L = 4 * latents frames each.

    Attributes:
        made, true: [n, 3, L, H, W] in -1..1, decoded from the estimate and from the true latents.
        made_faces, true_faces: [n L, 3, 80, 80] crops.
        who: [n, D] unit embeddings of the person, from the reference.
        motion: [n, L, 62] true motion, normalised.
        heard: [n, L, 11] the mouth that the speech encoder reads off the driving speech.
    """

    made: Tensor
    true: Tensor
    made_faces: Tensor
    true_faces: Tensor
    who: Tensor
    motion: Tensor
    heard: Tensor


@dataclass(frozen=True)
class Networks:
    """The frozen networks of the losses."""

    vae: VideoVAE
    identity: IdentityNet
    motion: MotionEncoder
    speech: SpeechEncoder


def open_networks(cfg: AvatarConfig, weights: Path) -> Networks:
    """Reads them from a folder of parts. Raises ArtifactError on one that is missing or does not fit."""
    parts: tuple[tuple[str, nn.Module], ...] = (
        ("vae", VideoVAE(cfg.vae)), ("identity", IdentityNet()), ("motion", MotionEncoder(cfg.motion)),
        ("speech", SpeechEncoder(cfg.speech)),
    )  # fmt: skip
    for name, part in parts:
        load_weights(part, weights / f"{name}.safetensors", dtype=torch.float32)
    return Networks(**dict(parts))  # type: ignore[arg-type]


class Suite:
    """The auxiliary losses of a stage.

    Args:
        terms: By name, some of NAMES.
        nets: Their networks; frozen here.
        samples, latents: How much of a batch is decoded in a step.
        dtype: What the decoder computes in.

    Raises: InputError on a name that is none of NAMES.
    """

    def __init__(
        self, terms: dict[str, Term], nets: Networks, *, samples: int = 2, latents: int = 2,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        if unknown := sorted(set(terms) - set(NAMES)):
            raise InputError(f"auxiliary losses: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
        self.terms, self.nets, self.samples, self.latents, self.dtype = terms, nets, samples, latents, dtype
        for part in vars(nets).values():
            part.requires_grad_(False).eval()
        self.losses: dict[str, Callable[[View], Tensor]] = {
            "identity": lambda view: identity(nets.identity, view.made_faces, view.who),
            "perceptual": lambda view: perceptual(nets.identity, view.made_faces, view.true_faces, len(view.who)),
            "temporal": lambda view: temporal(nets.identity, view.made_faces, view.true_faces, len(view.who)),
            "motion": lambda view: motion_fidelity(nets.motion, view.made, view.motion),
            "sync": lambda view: sync(nets.motion, view.made, view.heard),
        }

    def __call__(
        self, step: int, b: Any, z: Tensor, v: Tensor, t: Tensor, g: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses that are on, and each of them.

        Args:
            step: Of the run.
            b: The batch (``training.methods.windows.Batch``).
            z, v: [B, C, T, h, w] the noisy latents and the predicted velocity.
            t: [B, T] their times.
            g: Chooses what is decoded.
        """
        on = {name: term for name, term in self.terms.items() if term.at(step) > 0}
        rows, first = self.choose(t, b.given, max((term.t_max for term in on.values()), default=0.0), g)
        if not on or not len(rows):
            return v.new_zeros(()), {name: v.new_zeros(()) for name in self.terms}
        with torch.autocast(v.device.type, enabled=False):
            view = self.view(b, z, v.float(), t, rows, first)
            each = {name: self.losses[name](view).float() for name in on}  # [n]
        times = t[rows, first]
        parts = {name: (on[name].gate(times) * loss).mean() for name, loss in each.items()}
        total = v.new_zeros(()) + sum(on[name].at(step) * part for name, part in parts.items())
        return total, {name: parts.get(name, v.new_zeros(())).detach() for name in self.terms}

    def choose(self, t: Tensor, given: Tensor, t_max: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows [n] below ``t_max``, drawn at random, and the first of the latents [n] to decode in each.

        The latent before those is needed to start the decoder with, so windows need ``latents + 1`` of them.
        """
        room = t.shape[1] - self.latents
        low = torch.nonzero(t[:, -1].cpu() < t_max).flatten()
        if room < 1:
            return low[:0], low[:0]
        rows = low[torch.randperm(len(low), generator=g)[: self.samples]]
        first = torch.randint(1, room + 1, (len(rows),), generator=g)
        first = torch.maximum(first, given[rows.to(given.device)].sum(1).cpu().clamp(max=room))
        return rows.to(t.device), first.to(t.device)

    def view(self, b: Any, z: Tensor, v: Tensor, t: Tensor, rows: Tensor, first: Tensor) -> View:
        """Decodes what was chosen."""
        n, vae = len(rows), self.nets.vae
        span = first[:, None] + torch.arange(self.latents, device=first.device)

        def before(x: Tensor) -> Tensor:
            return x[rows, :, first - 1][:, :, None]

        def at(x: Tensor) -> Tensor:
            return x[rows[:, None], :, span].transpose(1, 2)

        estimate = data_of(at(z), at(v), t[rows[:, None], span][:, None, :, None, None])
        made = self.decode(torch.cat([before(b.x), estimate], dim=2))
        boxes = face_boxes(b.weight[rows, 0], vae.cfg.spatial_stride).repeat_interleave(made.shape[2], 0)
        with torch.no_grad():
            true = self.decode(torch.cat([before(b.x), at(b.x)], dim=2))
            person = self.person(b, rows)
            heard = b.audio if b.audio.shape[1] == 4 * b.x.shape[2] else nn.functional.pad(b.audio, (0, 0, 3, 0))
            heard = self.nets.speech.heads(heard.unflatten(1, (-1, 4))[rows[:, None], span].flatten(1, 2))["mouth"]
        faces, true_faces = (crop_faces(x.transpose(1, 2).flatten(0, 1), boxes) for x in (made, true))
        motion = b.motion[rows[:, None], span].unflatten(2, (4, -1)).flatten(1, 2)
        assert len(faces) == n * 4 * self.latents
        return View(made, true, faces, true_faces, person, motion, heard)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents [n, C, 1 + L, h, w] -> the 4 L frames of all but the first, [n, 3, 4 L, H, W] fp32."""
        vae = self.nets.vae
        return vae.decode_unclamped(vae.denormalize(z.float()).to(self.dtype), None)[0][:, :, 1:].float()

    def person(self, b: Any, rows: Tensor) -> Tensor:
        """Unit embeddings [n, D] of the person of each window, as the reference shows them."""
        latents = b.ref_latents[rows // b.windows, : b.x.shape[1], :2]
        if latents.shape[2] < 2:  # the decoder needs one to start with
            latents = latents.expand(-1, -1, 2, -1, -1)
        frames = self.decode(latents)
        boxes = face_boxes(b.ref_weight[rows // b.windows, 0], self.nets.vae.cfg.spatial_stride)
        boxes = boxes.repeat_interleave(frames.shape[2], 0)
        who = self.nets.identity(crop_faces(frames.transpose(1, 2).flatten(0, 1), boxes))
        return nn.functional.normalize(who.unflatten(0, (len(rows), -1)).mean(1), dim=-1)


def face_boxes(mask: Tensor, stride: int) -> Tensor:
    """Face masks [n, h, w] in latents -> bounding boxes [n, 4] in pixels; the whole picture where there is no face."""
    inside = mask > 0.5
    inside = inside | ~inside.flatten(1).any(1)[:, None, None]
    rows, columns = inside.any(2).float(), inside.any(1).float()
    low = torch.stack([columns.argmax(1), rows.argmax(1)], 1)
    high = torch.stack([mask.shape[2] - columns.flip(1).argmax(1), mask.shape[1] - rows.flip(1).argmax(1)], 1)
    return torch.cat([low, high], 1).float() * stride
