"""Stage 1: video from text, and from a first frame, in one batch; short and small windows first, long and large later.

Nothing is heard and nobody is referred to: the model of this stage has neither part. A window's first latent is given
with probability ``p_i2v``: clean, at t = 0, marked as carried over, and out of the loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from training.methods.flow import Bucket
from training.methods.stage import FlowMethod, FlowSettings
from training.methods.windows import Batch


@dataclass(frozen=True)
class T2VSettings(FlowSettings):
    """``p_i2v``: share of the windows of more than one latent whose first is given."""

    buckets: tuple[Bucket, ...] = (
        Bucket(1, people=64, windows=2, down=2, first=0.2, last=0.0),
        Bucket(1, people=32, first=0.6, last=0.1),
        Bucket(3, people=10, first=0.15, last=0.2),
        Bucket(8, people=4, first=0.05, last=0.7),
    )
    p_i2v: float = 0.4


class T2VMethod(FlowMethod):
    """Flow loss of video under a caption, with or without the first latent."""

    settings: T2VSettings

    def draw(
        self, pool: Tensor, g: torch.Generator, bucket: Bucket, kind: str, alike: torch.Generator | None = None
    ) -> Batch:
        b = super().draw(pool, g, bucket, kind, alike)
        shown = torch.rand(len(b.x), generator=g) < self.settings.p_i2v
        if b.x.shape[2] < 2:
            return b
        given = b.given.clone()
        given[:, 0] = shown
        return dataclasses.replace(b, given=given)
