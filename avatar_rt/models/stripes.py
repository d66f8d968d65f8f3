"""The VAE decoder on one horizontal stripe of the picture: what crosses a seam between stripes is exchanged exactly.

A 3 x 3 convolution needs one row of each neighbour, frame attention everybody's keys and values; all else is local to
a pixel or to its past. Rows that a neighbour lacks (the picture's edges) are the convolution's own zeros. States are
the stripe's rows, without the neighbours'.
"""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.models.vae_blocks import CausalConv3d, FrameAttention, FrameConv2d, State

M = TypeVar("M", bound=nn.Module)


class Seams(Protocol):
    """How stripes meet. Tensors are [B, C, T, rows, W]."""

    def extend(self, *stripes: Tensor) -> tuple[list[Tensor], int]:
        """Each with the last row of the stripe above and the first of the one below, where there are such; and how
        many rows were added above."""
        ...

    def whole(self, stripe: Tensor) -> Tensor:
        """All stripes, from above to below."""
        ...


def striped(vae: M, seams: Seams) -> M:
    """A copy of a VAE that shares its weights and decodes one stripe."""
    shared = {id(p): p for p in (*vae.parameters(), *vae.buffers())}
    vae = copy.deepcopy(vae, shared)
    _replace(vae.decoder, seams)
    return vae


def _replace(module: nn.Module, seams: Seams) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, CausalConv3d | FrameConv2d):
            if child.weight.shape[-1] > 1:
                setattr(module, name, StripedConv(child, seams))
        elif isinstance(child, FrameAttention):
            setattr(module, name, StripedAttention(child, seams))
        else:
            _replace(child, seams)


class StripedConv(nn.Module):
    """A convolution of width 3 with its neighbours' rows; twice one row more is computed than needed, and cut off."""

    def __init__(self, conv: CausalConv3d | FrameConv2d, seams: Seams) -> None:
        super().__init__()
        self.conv, self.seams = conv, seams
        self.num_states = getattr(conv, "num_states", 0)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        rows, past = x.shape[3], tuple(state or ())
        (x, *past), above = self.seams.extend(x, *past)
        if isinstance(self.conv, FrameConv2d):
            return self.conv(x)[:, :, :, above : above + rows]
        y, after = self.conv(x, tuple(past) or None)
        return y[:, :, :, above : above + rows], tuple(s[:, :, :, above : above + rows] for s in after)


class StripedAttention(nn.Module):
    """Own rows' queries over the keys and values of whole frames."""

    num_states = 0

    def __init__(self, attention: FrameAttention, seams: Seams) -> None:
        super().__init__()
        self.attention, self.seams = attention, seams

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        b, c, t, h, w = x.shape
        qkv = self.attention.qkv(self.attention.norm(x))
        q, kv = qkv[:, :c], self.seams.whole(qkv[:, c:])
        q, k, v = (_rows(part) for part in (q, kv[:, :c], kv[:, c:]))
        y = F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return x + self.attention.proj(y), ()


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, 1, H * W, C]."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)[:, None]
