"""Flow matching of video and motion together, from speech, scene and a reference of another scene.

z_t = (1 - t) x + t eps, target v = eps - x (arXiv 2403.03206); motion is noised with the same t (arXiv 2502.02492).
A window starts a clip (scene image as anchor) or continues one (two clean latents, first latent of the clip as anchor).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.motion import MotionEncoder, group_motion
from avatar_rt.models.text import TextEncoder
from avatar_rt.models.weights import load_weights, save_weights


@dataclass(frozen=True)
class AvatarSettings:
    """Loss weights and drop-out rates of the conditions.

    Attributes:
        buckets: (latent frames of a window, clips of a batch, share of the steps at the run's start, at its end):
            short windows first, because a batch then holds more people for the same work.
        reference_lengths: Latent frames of the reference, one drawn per batch; half of the batches take neighbouring
            frames, half frames from all over the clip.
        mouth_weight, face_weight: Added to the flow loss's weight map there, before it is normalised to mean 1.
        motion_weight: Weight of the motion stream's flow loss.
        temporal_weight: Weight of the same loss on differences between neighbouring frames: most of a mouth's latent
            never changes in a clip, and the little that does is what speech decides.
        drop_*: Probability that a condition is absent; the reference is dropped for a whole batch.
        shift: Flow shift of the sampled times.
    """

    buckets: tuple[tuple[int, int, float, float], ...] = ((2, 64, 0.8, 0.3), (8, 16, 0.2, 0.7))
    reference_lengths: tuple[int, ...] = (2, 3, 5)
    mouth_weight: float = 10.0
    face_weight: float = 4.0
    motion_weight: float = 0.4
    temporal_weight: float = 1.0
    drop_reference: float = 0.1
    drop_audio: float = 0.1
    drop_text: float = 0.5
    continue_rate: float = 0.5
    shift: float = 3.0


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


class AvatarMethod:
    """The first training of the whole model: reference, speech, scene and motion at once."""

    def __init__(self, cfg: AvatarConfig, corpus: Path, weights: Path, settings: AvatarSettings, steps: int) -> None:
        self.cfg, self.settings, self.steps = cfg, settings, steps
        self.module = nn.ModuleDict({"dit": VideoRefDiT(cfg.dit), "text": TextEncoder(cfg.text)})
        motion = MotionEncoder(cfg.motion)
        load_weights(motion, weights / "motion.safetensors", dtype=torch.float32)
        self.table = Table(corpus, motion, cfg.vae.spatial_stride)
        text: TextEncoder = self.module["text"]
        self.ids = torch.stack([text.tokenize(c) for c in self.table.captions])

    # ---- batches -------------------------------------------------------------------------------------------------

    def batch(
        self, pool: Tensor, g: torch.Generator, window: int, size: int, *, first: bool | None = None
    ) -> dict[str, Tensor]:
        """One batch of windows: all start a clip, or all continue one (and then hold more than the carried latents)."""
        s, table = self.settings, self.table
        clip = pool[torch.randint(len(pool), (size,), generator=g)]
        total, per = table.latents.shape[1], self.cfg.dit.audio_per_latent
        start_of_clip = bool(torch.rand((), generator=g) >= s.continue_rate) if first is None else first
        if not start_of_clip and window <= self.cfg.chunk.overlap:
            window += self.cfg.chunk.overlap
        start = torch.zeros(size, dtype=torch.long)
        if not start_of_clip:
            start = torch.randint(1, total - window + 1, (size,), generator=g)
        index = start[:, None] + torch.arange(window)
        x = table.latents[clip[:, None], index].float().transpose(1, 2)
        frames = (index[:, :, None] * per - (per - 1) + torch.arange(per)).flatten(1)
        audio = table.speech[clip[:, None], frames.clamp(min=0)].float()
        pick = torch.randint(table.scenes.shape[1], (size,), generator=g)
        scene, kept = table.scenes[clip, pick].float(), table.scene_masks[clip, pick].float()
        if not start_of_clip:
            scene, kept = table.latents[clip, 0].float(), torch.ones_like(kept)
        length = s.reference_lengths[int(torch.randint(len(s.reference_lengths), (), generator=g))]
        sibling = torch.tensor(
            [table.siblings[i][int(torch.randint(len(table.siblings[i]), (), generator=g))] for i in clip.tolist()]
        )
        if torch.rand((), generator=g) < 0.5:
            ref_start = torch.randint(1, total - length + 1, (size,), generator=g)
            ref_index = ref_start[:, None] + torch.arange(length)
        else:
            ref_index = 1 + torch.rand(size, total - 1, generator=g).argsort(1)[:, :length].sort(1).values
        ref_frames = (ref_index[:, :, None] * per - (per - 1) + torch.arange(per)).flatten(1)
        return {
            "x": x,
            "audio": audio,
            "motion": table.motion[clip[:, None], index],
            "anchor": torch.cat([scene, kept[:, None], torch.zeros_like(kept)[:, None]], dim=1)[:, :, None],
            "prefix": torch.tensor(0 if start_of_clip else self.cfg.chunk.overlap),
            "weight": table.weight[clip],
            "ids": self.ids[clip],
            "clip": clip,
            "start": start,
            "ref": with_masks(table.latents[sibling[:, None], ref_index].float().transpose(1, 2), self.cfg.dit, 1, 0),
            "ref_audio": table.speech[sibling[:, None], ref_frames].float(),
            "ref_motion": table.motion[sibling[:, None], ref_index],
        }

    def loss(self, b: dict[str, Tensor], t: Tensor, g: torch.Generator, *, drop: bool) -> dict[str, Tensor]:
        """Flow loss of a batch at times t [B]."""
        s, dit, text = self.settings, self.module["dit"], self.module["text"]
        size, frames = b["x"].shape[0], b["x"].shape[2]
        prefix = int(b["prefix"])
        noise, motion_noise = (torch.randn(b[k].shape, generator=g) for k in ("x", "motion"))
        t_frames = t[:, None].expand(size, frames).clone()
        t_frames[:, :prefix] = 0
        tv, tm = t_frames[:, None, :, None, None], t_frames[:, :, None]
        z = torch.lerp(b["x"], noise, tv)
        m = torch.lerp(b["motion"], motion_noise, tm)
        carried = (t_frames == 0).float()[:, None, :, None, None].expand(-1, 1, -1, *z.shape[-2:])
        if prefix == 0:
            carried = torch.zeros_like(carried)
        latents = torch.cat([z, torch.zeros_like(carried), carried], dim=1)
        ids, audio, ref = b["ids"], b["audio"], True
        if prefix == 0:  # the first latent holds one frame: its other slots are null, as in a request
            null = dit.null_audio.expand(size, self.cfg.dit.audio_per_latent - 1, -1)
            audio = torch.cat([null, audio[:, self.cfg.dit.audio_per_latent - 1 :]], dim=1)
        if drop:
            ids = torch.where(torch.rand(size, 1, generator=g) < s.drop_text, torch.zeros_like(ids), ids)
            audio = torch.where(torch.rand(size, 1, 1, generator=g) < s.drop_audio, dit.null_audio, audio)
            ref = bool(torch.rand((), generator=g) >= s.drop_reference)
        else:
            ids = torch.zeros_like(ids)
        ref_k = ref_v = None
        if ref:
            empty = text(torch.zeros_like(ids[:1]))
            ref_k, ref_v = dit.encode_reference(b["ref"], empty, b["ref_audio"], b["ref_motion"])
        v, vm = dit(
            latents,
            t_frames,
            text(ids),
            audio,
            anchor=b["anchor"],
            anchor_t=torch.zeros(size),
            motion=m,
            ref_k=ref_k,
            ref_v=ref_v,
        )
        face, mouth = b["weight"].unbind(1)
        weight = 1 + s.face_weight * face + s.mouth_weight * mouth
        weight = (weight / weight.mean((1, 2), keepdim=True))[:, None, None]
        residual = (v - (noise - b["x"]))[:, :, prefix:]
        error = residual.square()
        motion_error = (vm - (motion_noise - b["motion"]))[:, prefix:].square()
        flow, motion_flow = (error * weight).mean(), motion_error.mean()
        temporal = 0.5 * (residual.diff(dim=2).square() * weight).mean()
        loss = flow + s.temporal_weight * temporal + s.motion_weight * motion_flow
        plain = error.detach().mean((1, 2, 3, 4))
        return {"loss": loss, "flow": flow, "temporal": temporal, "motion": motion_flow, "plain": plain}

    # ---- Method ----------------------------------------------------------------------------------------------------

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        g, s = generator, self.settings
        done = min(step / max(self.steps, 1), 1.0)
        shares = torch.tensor([(1 - done) * first + done * last for _, _, first, last in s.buckets])
        window, size, _, _ = s.buckets[int(torch.multinomial(shares, 1, generator=g))]
        batch = self.batch(self.table.train, g, window, size)
        t = torch.sigmoid(torch.randn(size, generator=g))
        t = s.shift * t / (1 + (s.shift - 1) * t)
        values = self.loss(batch, t, g, drop=True)
        del values["plain"]
        return values | {"samples": size}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Flow loss at fixed times on held-out identities, with every condition, and without speech or reference."""
        wrong = {"wrong_audio": ("audio",), "wrong_ref": ("ref", "ref_audio", "ref_motion")}
        result = {}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for t in (0.3, 0.6, 0.9):
                for name, rolled in {"flow": (), **wrong}.items():
                    g = torch.Generator().manual_seed(1)  # the same batch and noise each time
                    batch = self.batch(self.table.val, g, 8, 32, first=True)
                    batch |= {key: batch[key].roll(1, 0) for key in rolled}
                    values = self.loss(batch, torch.full((32,), t), g, drop=False)
                    result[f"{name}@{t}"] = float(values["plain"].mean())
                    if not rolled:
                        result[f"motion@{t}"] = float(values["motion"])
        return result

    def export(self, out: Path) -> None:
        save_weights(self.module["dit"], out / "dit.safetensors", dtype=torch.bfloat16)
        save_weights(self.module["text"], out / "text.safetensors", dtype=torch.bfloat16)
