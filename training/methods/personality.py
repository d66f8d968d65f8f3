"""Stage 3: who it is and how they move. A clip of the person in another scene comes in through sparse reference
attention, motion tokens are generated with the video and steer it, and losses look at the decoded face.

Every reference is encoded once a step, whatever the number of windows that share it. Motion is noised with the video's
own t and predicted beside it (arXiv 2502.02492); a share of the windows gets none, and a share gets another person's,
so that the picture does not lean on it alone. Neither share is asked to predict motion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avatar_rt.config import AvatarConfig
from training.losses.suite import Suite, Term
from training.methods import flow
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket
from training.methods.windows import Batch, Drawer


@dataclass(frozen=True)
class PersonalitySettings(A2VSettings):
    """What stage 3 adds.

    Attributes:
        reference_lengths: Latent frames of a reference, one drawn per batch.
        same_scene: Ablation: the reference is of the window's own clip.
        drop_reference: Share of the batches without a reference; 1 is the ablation.
        motion_weight: Of the motion's flow loss.
        drop_motion: Share of the windows whose motion tokens are zeros.
        shuffle_motion: Share whose motion tokens are those of another window, noised at its own t.
        terms: The auxiliary losses by name, see ``training.losses.suite``; empty is the ablation.
        aux_samples, aux_latents: Windows and consecutive latents of each that are decoded for them in a step.
    """

    adds: tuple[str, ...] = ("anchor", "audio", "reference", "motion")
    buckets: tuple[Bucket, ...] = (
        Bucket(1, people=8, windows=4, first=0.6, last=0.2),
        Bucket(3, people=8, windows=2, first=0.3, last=0.4),
        Bucket(8, people=6, windows=1, first=0.1, last=0.4),
    )
    picture_rate: float = 0.0
    reference_lengths: tuple[int, ...] = (2, 4, 8)
    same_scene: bool = False
    drop_reference: float = 0.1
    motion_weight: float = 0.4
    drop_motion: float = 0.1
    shuffle_motion: float = 0.1
    terms: dict[str, Term] = field(default_factory=dict)
    aux_samples: int = 1
    aux_latents: int = 2


class PersonalityMethod(A2VMethod):
    """Flow losses of video and motion under all conditions, and the losses on decoded faces.

    Args:
        cfg, table, settings, steps: As of ``FlowMethod``.
        suite: Computes ``settings.terms``; None where there are none.
    """

    settings: PersonalitySettings
    apart, at_once = ("motion", "own_motion"), ("reference",)

    def __init__(
        self, cfg: AvatarConfig, table: Any, settings: PersonalitySettings, steps: int, suite: Suite | None = None
    ) -> None:
        super().__init__(cfg, table, settings, steps)
        self.suite = suite

    def wrong(self) -> dict[str, tuple[str, ...]]:
        other = ("ref_latents", "ref_audio", "ref_motion", "ref_weight")
        return {**super().wrong(), **({"wrong_ref": other} if self.settings.drop_reference < 1 else {})}

    def make_drawer(self) -> Drawer:
        s = self.settings
        return Drawer(self.table, self.cfg, reference_lengths=s.reference_lengths, same_scene=s.same_scene)

    def conditions(
        self, b: Batch, t: Tensor, keep: dict[str, Tensor], g: torch.Generator
    ) -> tuple[dict[str, Any], Tensor | None]:
        told, _ = super().conditions(b, t, keep, g)
        told |= self._reference(b) if keep["reference"][0] else {}
        if not self.cfg.dit.motion_dim:
            return told, None
        noise = torch.randn(b.motion.shape, generator=g).to(t.device)
        shuffled, dropped = ~keep["own_motion"], ~keep["motion"]
        motion = torch.where(shuffled[:, None, None], b.motion.roll(b.windows, 0), b.motion)
        motion = flow.noised(motion, noise, t[:, :, None])
        told["motion"] = motion.masked_fill(dropped[:, None, None], 0.0)
        keep["motion_target"] = keep["motion"] & keep["own_motion"]
        return told, flow.velocity(b.motion, noise)

    def _reference(self, b: Batch) -> dict[str, Tensor]:
        """K and V of the reference rows, encoded once per person, for all windows of each."""
        dit = self.module["dit"]
        if not self.cfg.dit.reference:
            return {}
        empty = self.context(b.clip[:1], torch.zeros(1, dtype=torch.bool, device=b.x.device))
        motion = b.ref_motion if self.cfg.dit.motion_dim else None
        k, v = dit.encode_reference(b.ref_latents, empty, b.ref_audio, motion, spread=self.spread)
        return {"ref_k": k.repeat_interleave(b.windows, dim=1), "ref_v": v.repeat_interleave(b.windows, dim=1)}

    def rates(self) -> dict[str, float]:
        s = self.settings
        return {
            **super().rates(), "reference": s.drop_reference, "motion": s.drop_motion, "own_motion": s.shuffle_motion,
        }  # fmt: skip

    def extras(
        self, step: int, b: Batch, z: Tensor, v: Tensor, t: Tensor, g: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        read, told = super().extras(step, b, z, v, t, g)
        if self.suite is None:
            return read, told
        total, parts = self.suite(step, b, z, v, t, g)
        return read + total, told | {f"aux_{name}": part for name, part in parts.items()}
