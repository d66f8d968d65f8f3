"""Stage 2: the model hears. Speech comes in through a cross-attention that at first adds nothing, a place or a picture
of the person through the anchor.

Two shortcuts are closed. A picture of the person is taken well before or after the window, so that its mouth belongs to
another sound than the one being heard. And no other video goes in: a reference arrives with stage 3, from another clip
with another sentence.

The flow loss alone teaches hearing slowly: what speech decides is a small part of what a picture holds. With
``read_weight``, a projection that only training has reads the mouth's motion off the rows of a middle block, as
representation alignment (arXiv 2410.06940) does with the features of an image encoder; from noise only speech tells it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, mouth_channels
from training.methods import flow
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
        read_weight: Of the loss on the mouth's motion as read off a middle block's rows; 0 is off.
    """

    adds: tuple[str, ...] = ("anchor", "audio")
    buckets: tuple[Bucket, ...] = (Bucket(3, people=10, first=0.6, last=0.3), Bucket(8, people=4, first=0.4, last=0.7))
    drop_text: float = 0.5
    drop_audio: float = 0.1
    next_rate: float = 0.3
    picture_rate: float = 0.5
    picture_gap: int = 2
    read_weight: float = 0.0


class MouthReader(nn.Module):
    """Rows of the mouth -> the mouth's motion of a latent's four frames. Only training has it.

    Args:
        dim: Of the transformer's rows.
        motion: Of the motion tokens, of which ``models.motion.mouth_channels`` are read.
    """

    def __init__(self, dim: int, motion: int) -> None:
        super().__init__()
        self.register_buffer("channels", mouth_channels(motion).nonzero()[:, 0], persistent=False)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, len(self.channels))

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows [B, T, n, C] of a block's patches, their shares [B, n] of the mouth -> [B, T, channels] fp32."""
        return self.out(self.norm(torch.einsum("btnc,bn->btc", rows.float(), weight))).float()

    def loss(self, rows: Tensor, weight: Tensor, motion: Tensor, free: Tensor) -> Tensor:
        """Mean squared error of what is read over the latents ``free`` [B, T]; motion [B, T, M] is the true one."""
        error = (self(rows, weight) - motion[:, :, self.channels]).square().mean(2)
        return flow.mean_of(error, free)


def mouth_shares(mask: Tensor, patch: tuple[int, int]) -> Tensor:
    """The mouth's mask [B, h, w] -> shares [B, patches], of sum 1; alike where a picture shows no mouth."""
    share = F.avg_pool2d(mask[:, None], patch).flatten(1) + 1e-6
    return share / share.sum(1, keepdim=True)


class A2VMethod(FlowMethod):
    """Flow loss of video under speech, a picture and a caption."""

    settings: A2VSettings

    def __init__(self, cfg: AvatarConfig, table: Any, settings: A2VSettings, steps: int) -> None:
        super().__init__(cfg, table, settings, steps)
        self.rows: Tensor | None = None  # of the middle block, in the last pass
        if settings.read_weight:
            self.module["mouth_reader"] = MouthReader(cfg.dit.dim, FRAMES_PER_LATENT * len(MOTION_NAMES))
            blocks = self.module["dit"].blocks
            blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: Any, rows: Tensor) -> None:
        self.rows = rows if torch.is_grad_enabled() else None

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

    def extras(
        self, step: int, b: Batch, z: Tensor, v: Tensor, t: Tensor, g: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "mouth_reader" not in self.module:
            return super().extras(step, b, z, v, t, g)
        if self.spread is not None:
            raise InputError("read_weight: expected 0 where ranks share a batch, each of them has some rows only")
        assert self.rows is not None
        _, p, q = self.cfg.dit.patch
        frames, patches = b.x.shape[2], (b.x.shape[3] // p) * (b.x.shape[4] // q)
        size = patches + bool(self.cfg.dit.motion_dim)
        rows = self.rows[:, : frames * size].unflatten(1, (frames, size))[:, :, :patches]
        read = self.module["mouth_reader"].loss(rows, mouth_shares(b.weight[:, 1], (p, q)), b.motion, ~b.given)
        self.rows = None
        return self.settings.read_weight * read, {"read": read}
