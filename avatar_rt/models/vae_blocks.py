"""Layers of the causal video VAE. Each maps (x, state) to (x, state) and keeps nothing between calls.

A state is a flat tuple of tensors, ``None`` at the start of a stream. Layers disagree on what the first frame means
(temporal resampling passes it through alone), so a stream's first call carries 1 + n frames and later calls n.
The number of states of a layer and, per stream, their shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.ops import causal_conv3d

State = tuple[Tensor, ...]


class CausalConv3d(nn.Module):
    """Convolution that sees the past only. Computes in the dtype of its input, whatever the weights are stored in.

    Shapes: x [B, in_dim, T, H, W] -> [B, out_dim, T, H, W]; one state [B, in_dim, kt - 1, H, W] when kt > 1.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, *kernel))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.num_states = int(kernel[0] > 1)
        _init_conv(self.weight)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        past = state[0] if state else None
        y, past = causal_conv3d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), past)
        return y, (past,) if self.num_states else ()


class FrameConv2d(nn.Module):
    """Plain convolution of each frame: x [B, in_dim, T, H, W], weight [out_dim, in_dim, k, k]."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.stride = stride
        _init_conv(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if self.stride == 1:
            padding = self.weight.shape[-1] // 2
            return F.conv3d(x, weight.unsqueeze(2), bias, padding=(0, padding, padding))
        # Wan pads only to the right and below when it halves the picture.
        return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight.unsqueeze(2), bias, stride=(1, self.stride, self.stride))


class ChannelNorm(nn.Module):
    """RMS norm over channels, times a learned weight; x [B, C, T, H, W]. Accumulates in fp32.

    The weight keeps its trailing ones ([C, 1, 1, 1], in attention [C, 1, 1]): published weights load as they are.
    """

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight)


class NormSiLU(ChannelNorm):
    """ChannelNorm, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm_silu(x, self.weight)


def channel_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C, T, H, W] over its length along C, times sqrt(C) and weight [C, 1, ...]."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    return (x * (x.shape[1] ** 0.5 / length) * weight.float().view(-1, 1, 1, 1)).to(x.dtype)


def channel_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """``channel_norm``, then SiLU: a function of its own because training compiles it."""
    return F.silu(channel_norm(x, weight))


class ResidualBlock(nn.Module):
    """(norm, SiLU, convolution) twice, plus the input. Two states (none when the kernel has no time extent)."""

    def __init__(self, in_dim: int, out_dim: int, time_kernel: int = 3) -> None:
        super().__init__()
        kernel = (time_kernel, 3, 3)
        self.norm1 = NormSiLU(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, kernel)
        self.norm2 = NormSiLU(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, kernel)
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else None
        self.num_states = self.conv1.num_states + self.conv2.num_states

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        n = self.conv1.num_states
        y, first = self.conv1(self.norm1(x), state[:n] if state else None)
        y, second = self.conv2(self.norm2(y), state[n:] if state else None)
        if self.shortcut is not None:
            x, _ = self.shortcut(x)
        return x + y, first + second


class FrameAttention(nn.Module):
    """Single-head self-attention within each frame, plus the input. No state."""

    num_states = 0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, trailing=2)
        self.qkv = FrameConv2d(dim, 3 * dim, 1)
        self.proj = FrameConv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        b, c, t, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 4, 1).reshape(b * t, 1, h * w, 3 * c)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return x + self.proj(y), ()


class Downsample(nn.Module):
    """Halve height and width and, where ``temporal``, time: frame 0 alone, then two frames to one.

    State where temporal: the last frame at the lower size, [B, C, 1, H/2, W/2].
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = FrameConv2d(dim, dim, 3, stride=2)
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1)) if temporal else None
        self.num_states = int(temporal)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.conv(x)
        if self.time_conv is None:
            return x, ()
        last = (x[:, :, -1:],)
        head = []
        if state is None:
            head, state, x = [x[:, :, :1]], (x[:, :, :1],), x[:, :, 1:]
        if x.shape[2]:
            # Windows are (before, a, b): handing `a` over as state lines the stride up without a discarded output.
            past = torch.cat([state[0], x[:, :, :1]], dim=2)
            weight, bias = self.time_conv.weight.to(x.dtype), self.time_conv.bias.to(x.dtype)
            y, _ = causal_conv3d(x[:, :, 1:], weight, bias, past, stride=(2, 1, 1))
            head.append(y)
        return torch.cat(head, dim=2) if len(head) > 1 else head[0], last


class Upsample(nn.Module):
    """Double height and width, halve the channels and, where ``temporal``, double every frame but the first.

    State where temporal: that of the time convolution, [B, C, 2, H, W]. The stream's first frame never enters it.
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None
        self.conv = FrameConv2d(dim, dim // 2, 3)
        self.num_states = int(temporal)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if self.time_conv is not None:
            x, state = _double_time(self.time_conv, x, state)
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")), state or ()


def _double_time(conv: CausalConv3d, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Two frames out for each frame in, but one for the first of a stream."""
    first = None
    if state is None:
        first, x = x[:, :, :1], x[:, :, 1:]
        state = (first.new_zeros(*first.shape[:2], 2, *first.shape[3:]),)
    if x.shape[2]:
        b, c, t, h, w = x.shape
        x, state = conv(x, state)
        x = x.reshape(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
    return x if first is None else torch.cat([first, x], dim=2), state


class OutputHead(nn.Module):
    """Norm, SiLU, convolution."""

    def __init__(self, in_dim: int, out_dim: int, time_kernel: int = 3) -> None:
        super().__init__()
        self.norm = NormSiLU(in_dim)
        self.conv = CausalConv3d(in_dim, out_dim, (time_kernel, 3, 3))
        self.num_states = self.conv.num_states

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.conv(self.norm(x), state)


def run_chain(layers: Iterable[nn.Module], x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Run layers in order, giving each its share of the flat ``state``; returns the output and the new flat state."""
    after: list[Tensor] = []
    at = 0
    for layer in layers:
        share = None if state is None else state[at : at + layer.num_states]
        x, new = layer(x, share)
        at += layer.num_states
        after.extend(new)
    return x, tuple(after)


def fold_patch(x: Tensor, patch: int) -> Tensor:
    """Space to depth: [B, C, T, H, W] -> [B, C * patch^2, T, H / patch, W / patch], channel order (c, column, row)."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch * patch, t, h // patch, w // patch)


def unfold_patch(x: Tensor, patch: int) -> Tensor:
    """The inverse of ``fold_patch``."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, t, h * patch, w * patch)


def _init_conv(weight: Tensor) -> None:
    if not weight.is_meta:
        nn.init.kaiming_uniform_(weight, a=5**0.5)
