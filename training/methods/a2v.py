"""Stage 2: the model hears. Speech comes in through a cross-attention that at first adds nothing, a place or a picture
of the person through the anchor.

Two shortcuts are closed. A picture of the person is taken well before or after the window, so that its mouth belongs to
another sound than the one being heard. And no other video goes in: a reference arrives with stage 3, from another clip
with another sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.methods.flow import Bucket
from training.methods.stage import FlowMethod, FlowSettings
from training.methods.windows import Batch


@dataclass(frozen=True)
class A2VSettings(FlowSettings):
    """What stage 2 adds.

    Attributes:
        drop_audio: Share of the windows that hear nothing (the learned null); 1 is the ablation without sound.
        picture_rate: Share of the windows whose anchor is a picture of the person; the others get the place alone, or
            with the head blanked.
        picture_gap: Latents (160 ms each) between that picture and the window, at least.
    """

    adds: tuple[str, ...] = ("anchor", "audio")
    buckets: tuple[Bucket, ...] = (Bucket(3, people=10, first=0.6, last=0.3), Bucket(8, people=4, first=0.4, last=0.7))
    drop_text: float = 0.5
    drop_audio: float = 0.1
    next_rate: float = 0.3
    picture_rate: float = 0.5
    picture_gap: int = 2


class A2VMethod(FlowMethod):
    """Flow loss of video under speech, a picture and a caption."""

    settings: A2VSettings

    def draw(
        self, pool: Tensor, g: torch.Generator, bucket: Bucket, kind: str, alike: torch.Generator | None = None
    ) -> Batch:
        b, s = super().draw(pool, g, bucket, kind, alike), self.settings
        return self.drawer.picture(b, s.picture_gap, s.picture_rate, g) if s.picture_rate else b

    def wrong(self) -> dict[str, tuple[str, ...]]:
        return {"wrong_audio": ("audio",)} if self.settings.drop_audio < 1 else {}

    def rates(self) -> dict[str, float]:
        return {**super().rates(), "audio": self.settings.drop_audio}

    def conditions(
        self, b: Batch, t: Tensor, keep: dict[str, Tensor], g: torch.Generator
    ) -> tuple[dict[str, Any], Tensor | None]:
        told, motion = super().conditions(b, t, keep, g)
        silent = self.module["dit"].null_audio
        told["audio"] = torch.where(keep["audio"][:, None, None], b.audio, silent)
        told["anchor"], told["anchor_t"] = b.anchor, t.new_zeros(len(t))
        return told, motion
