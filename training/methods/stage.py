"""What the three stages have in common: one model that grows, one draw, one flow loss, one way to begin.

A stage is a subclass with its own settings: ``draw`` makes its batches, ``conditions`` what the transformer is told,
``extras`` the losses that are its own. Everything random is drawn on the CPU from the loop's generator, so that a run
is the same on any device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.spread import Spread
from avatar_rt.models.text import TextEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights, save_weights
from training.methods import flow, sheet
from training.methods.flow import Bucket
from training.methods.windows import Batch, Drawer
from training.recipe import common
from training.weights import put

ADDITIONS = {
    "anchor": ("anchor_embedding", "anchor_patch_embedding"),
    "audio": ("audio_embedding", "audio_position", "null_audio", ".norm4.", ".audio_attn."),
    "reference": ("reference_", "null_reference_audio", "_adapter."),
    "motion": ("motion_embedding", "motion_injection", "motion_head"),
}
"""What a stage may add to the transformer, and the names of its parameters."""

AIDS = ("mouth_reader",)
"""Parts of a stage's module that only help to train it: not exported, and not asked of earlier weights."""


@dataclass(frozen=True)
class FlowSettings:
    """What every stage's loss is made of.

    Attributes:
        buckets: Sizes of windows over the run.
        face_weight, mouth_weight: Added to the loss's weight map there, before it is normalised to mean 1.
        temporal_weight: Of the flow loss on differences between neighbouring latents.
        free_rate, next_rate: Share of the batches whose windows start anywhere with nothing carried over, and of those
            that continue a clip; the others start one, but where videos are led in.
        drop_text: Share of the windows that lose their caption; drop_all: of the batches, that lose every condition.
        time_mean, time_std: Of the normal whose sigmoid the times are.
        token_shift: Shift the times by the window's tokens; off, all windows take the shift of a whole chunk.
        clips: Train on the first so many clips, and measure on them; 0 is all of the corpus. To see that a stage can
            learn a clip by heart.
        adds: What this stage's model has beyond text and video, some of ADDITIONS.
    """

    buckets: tuple[Bucket, ...]
    face_weight: float = 5.0
    mouth_weight: float = 8.0
    temporal_weight: float = 1.0
    free_rate: float = 0.4
    next_rate: float = 0.0
    drop_text: float = 0.1
    drop_all: float = 0.05
    time_mean: float = 0.0
    time_std: float = 1.0
    token_shift: bool = True
    clips: int = 0
    adds: tuple[str, ...] = ()


def stage_config(cfg: AvatarConfig, adds: tuple[str, ...]) -> AvatarConfig:
    """``cfg`` without the additions that a stage does not have yet."""
    d = cfg.dit
    return dataclasses.replace(
        cfg,
        dit=dataclasses.replace(
            d,
            anchor=d.anchor and "anchor" in adds,
            anchor_concat=d.anchor_concat and "anchor" in adds,
            audio_dim=d.audio_dim if "audio" in adds else 0,
            reference=d.reference and "reference" in adds,
            reference_audio_dim=d.reference_audio_dim if "reference" in adds and "audio" in adds else 0,
            audio_adapter_dim=d.audio_adapter_dim if "reference" in adds and "audio" in adds else 0,
            motion_dim=d.motion_dim if "motion" in adds else 0,
        ),
    )  # fmt: skip


class FlowMethod:
    """Text to video, and the frame that the stages build on.

    Args:
        cfg: Sizes of the finished model; ``settings.adds`` says which of its additions this stage has.
        table: The encoded corpus; None builds the module alone.
        settings: The stage's.
        steps: Of the run: what the buckets' shares move over.
    """

    spread: Spread | None = None  # over which ranks the transformer's rows are spread
    vae: VideoVAE | None = None  # decodes what validation shows

    def __init__(self, cfg: AvatarConfig, table: Any, settings: FlowSettings, steps: int) -> None:
        self.cfg, self.table, self.settings, self.steps = stage_config(cfg, settings.adds), table, settings, steps
        parts: dict[str, nn.Module] = {"dit": VideoRefDiT(self.cfg.dit)}
        if cfg.text.buckets:
            parts["text"] = TextEncoder(cfg.text)
        self.module = nn.ModuleDict(parts)
        silence(parts["dit"])
        if table is not None:
            self.drawer = self.make_drawer()
            if "text" in parts:
                self.ids = torch.stack([parts["text"].tokenize(c) for c in table.captions])

    # ---- what a stage says -----------------------------------------------------------------------------------------

    def make_drawer(self) -> Drawer:
        return Drawer(self.table, self.cfg, reference_lengths=(1,))

    def draw(
        self, pool: Tensor, g: torch.Generator, bucket: Bucket, kind: str, alike: torch.Generator | None = None
    ) -> Batch:
        """One batch, see ``Drawer``."""
        return self.drawer(pool, g, bucket, kind, alike)

    def rates(self) -> dict[str, float]:
        """Drop-out rate of each condition."""
        return {"text": self.settings.drop_text}

    def conditions(
        self, b: Batch, t: Tensor, keep: dict[str, Tensor], g: torch.Generator
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Keyword arguments of the transformer besides its text, and the motion's target velocity or None.

        ``t`` [B, T] are the latents' times, ``keep`` bool [B] says which window keeps which condition.
        """
        return {}, None

    def extras(
        self, step: int, b: Batch, z: Tensor, v: Tensor, t: Tensor, g: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the stage adds to the loss, and the parts of it to be logged."""
        return v.new_zeros(()), {}

    apart: tuple[str, ...] = ()
    """Conditions that are not dropped with all the others."""
    at_once: tuple[str, ...] = ()
    """Conditions that a batch has or has not."""

    def wrong(self) -> dict[str, tuple[str, ...]]:
        """Validation also measures the error with these fields of the batch given to the wrong window."""
        return {"wrong_text": ("clip",)}

    # ---- the loss --------------------------------------------------------------------------------------------------

    def kind(self, g: torch.Generator) -> str:
        at, s = float(torch.rand((), generator=g)), self.settings
        if at < s.next_rate:
            return "next"
        return "free" if at < s.next_rate + s.free_rate else self.start

    @property
    def start(self) -> str:
        """The kind of a window that starts a video: a led-in one's is like any other."""
        return "free" if self.cfg.chunk.lead_in else "first"

    def batch(self, step: int, g: torch.Generator) -> tuple[Batch, Bucket]:
        """A step's batch; its sizes and its kind follow from the step alone."""
        alike = common(step)
        bucket = flow.draw_bucket(self.settings.buckets, step / max(self.steps, 1), alike)
        return self.draw(self.pool("train"), g, bucket, self.kind(alike), alike), bucket

    def times(self, count: int, bucket: Bucket, g: torch.Generator) -> Tensor:
        """Times [count] for windows of a bucket."""
        s = self.settings
        by = flow.token_shift(bucket.tokens(self.cfg), self.cfg) if s.token_shift else self.cfg.sampling.shift
        return flow.shift(flow.logit_normal(count, g, s.time_mean, s.time_std), by)

    def loss(self, b: Batch, t: Tensor, g: torch.Generator, *, step: int | None) -> dict[str, Tensor]:
        """Losses of a batch at times t [B]; ``step`` None is a measurement: nothing dropped, no losses but the flow's.

        Returns scalars: ``loss``, its parts, and ``plain``, the unweighted flow error.
        """
        s, device = self.settings, self.device
        noise = torch.randn(b.x.shape, generator=g).to(device)
        rates, all_rate = self.rates(), s.drop_all
        if step is None:  # what is never there is not there when it is measured either
            rates, all_rate = {name: float(rate >= 1) for name, rate in rates.items()}, 0.0
        drawn = flow.kept(len(b.x), rates, all_rate, g, common(step or 0, 1), apart=self.apart, at_once=self.at_once)
        keep = {name: k.to(device) for name, k in drawn.items()}
        b, text = b.to(device), self.context(b.clip, keep["text"])
        t_frames = t.to(device)[:, None].expand(b.given.shape).masked_fill(b.given, 0.0)
        z = flow.noised(b.x, noise, t_frames[:, None, :, None, None])
        told, motion_target = self.conditions(b, t_frames, keep, g)
        carried = b.given[:, None, :, None, None].float()
        rows = with_masks(z, self.cfg.dit, 0, carried)
        v, vm = self.module["dit"](rows, t_frames, text, spread=self.spread, cut=b.cut, **told)
        target, free = flow.velocity(b.x, noise), ~b.given
        region = flow.region_map(b.weight, s.face_weight, s.mouth_weight)
        error = flow.mean_of(flow.flow_errors(v, target, region), free)
        values = {"flow": error, "temporal": flow.temporal_loss(v, target, region, free)}
        loss = error + s.temporal_weight * values["temporal"]
        if motion_target is not None:
            seen = free & keep["motion_target"][:, None]
            values["motion"] = flow.mean_of((vm - motion_target).square().mean(2), seen)
            loss = loss + s.motion_weight * values["motion"]
        if step is not None:
            more, parts = self.extras(step, b, z, v, t_frames, g)
            loss, values = loss + more, values | parts
        plain = flow.mean_of((v.detach() - target).square().mean((1, 3, 4)), free)
        return {"loss": loss, **values, "plain": plain}

    def context(self, clip: Tensor, keep: Tensor) -> Tensor:
        """Text context [B, S, D] of the clips' captions; zero rows, the empty caption, where it is dropped.

        A model without a text encoder of its own takes embeddings: ``table.text`` [N, S, D].
        """
        if "text" in self.module:
            ids = self.ids[clip.cpu()].to(self.device)
            return self.module["text"](ids * keep[:, None])
        return self.table.text[clip.cpu()].to(self.device).float() * keep[:, None, None]

    def pool(self, split: str) -> Tensor:
        """Clips [n] to draw from. Raises InputError where the method was built without a corpus."""
        if self.table is None:
            raise InputError(
                "this method was built without a corpus: it is a module with settings, nothing to train on"
            )
        n = self.settings.clips
        return self.table.train[:n] if n else getattr(self.table, split)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    # ---- Method ----------------------------------------------------------------------------------------------------

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        b, bucket = self.batch(step, generator)
        t = self.times(len(b.x), bucket, generator)
        values = self.loss(b, t, generator, step=step)
        del values["plain"]
        count = float(len(b.x))
        return {**values, "samples": torch.tensor(count), "tokens": torch.tensor(count * bucket.tokens(self.cfg))}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Flow error at fixed times on held-out people, whole windows: right, with conditions of another window,
        and on people of the training (``seen``), whose error falls below when there are too few of them.

        After ``show``, ``video-<step>.png`` has a few of the windows beside what the model makes of noise.
        """
        frames = max(b.frames for b in self.settings.buckets)
        pool, result = self.pool("val"), {}
        bucket = Bucket(frames, people=min(16, 2 * len(pool)))
        measured = {name: (pool, fields) for name, fields in {"flow": (), **self.wrong()}.items()}
        measured["seen"] = (self.pool("train"), ())
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            for t in (0.3, 0.6, 0.9):
                for name, (clips, fields) in measured.items():
                    g = torch.Generator().manual_seed(1)  # the same windows and noise each time
                    b = self.draw(clips, g, bucket, self.start).rolled(*fields)
                    values = self.loss(b, torch.full((len(b.x),), t), g, step=None)
                    result[f"{name}@{t}"] = float(values["plain"])
                    if name == "flow" and "motion" in values:
                        result[f"motion@{t}"] = float(values["motion"])
            if self.vae is not None:
                g = torch.Generator().manual_seed(1)
                few = dataclasses.replace(bucket, people=min(sheet.PEOPLE, bucket.people))
                b = self.draw(pool, g, few, self.start)
                sheet.write_samples(self, self.vae, b, out / f"video-{step:06d}.png")
        result |= {n: sum(result[f"{n}@{t}"] for t in (0.3, 0.6, 0.9)) / 3 for n in measured}
        return result

    def show(self, weights: Path) -> None:
        """Has validations draw sheets of made windows, by the VAE of a folder of parts. Raises ArtifactError."""
        self.vae = VideoVAE(self.cfg.vae)
        load_weights(self.vae.eval(), weights / "vae.safetensors", dtype=torch.float32)

    def export(self, out: Path) -> None:
        """The parts in bf16, and ``config.json`` of the stage's model."""
        for name, part in self.module.items():
            if name in AIDS:
                continue
            save_weights(part, out / f"{name}.safetensors", dtype=torch.bfloat16)
        (out / "config.json").write_text(self.cfg.to_json())

    def filled(self) -> None:
        """The module's weights, built on the meta device, have their first values."""
        silence(self.module["dit"])

    def adopt(self, state: dict[str, Tensor], source: str) -> list[str]:
        """Begins from the weights of an earlier stage. What this stage adds stays as it was initialised, and so do
        its own AIDS where the earlier stage had none.

        Args:
            state: By the names of ``module.state_dict()``.
            source: What errors call it.

        Returns: the names that were not there.
        Raises: ArtifactError where something else is missing, of another shape, or unknown to this stage.
        """
        own, aids = self.module.state_dict(), tuple(f"{name}." for name in AIDS)
        state = {k: v for k, v in state.items() if k in own or not k.startswith(aids)}
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        new = [part for name in self.settings.adds for part in ADDITIONS[name]]
        lost = [k for k in missing if not k.startswith(aids) and not any(part in k for part in new)]
        wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        for what, names in (("lacks", lost), ("has", unknown), ("has other shapes for", sorted(wrong))):
            if names:
                told = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise ArtifactError(
                    f"{source}: expected the weights of this stage ({', '.join(self.settings.adds) or 'text and video'}"
                    f") or of an earlier one; it {what} {len(names)} tensors: {told}"
                )
        put(self.module, state)
        return missing


def silence(dit: nn.Module) -> None:
    """Zeroes what the speech's cross-attention adds, so that a model that hears begins as the one that did not."""
    for name, p in dit.named_parameters():
        if ".audio_attn.o." in name and not p.is_meta:
            nn.init.zeros_(p)
