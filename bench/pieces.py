"""The other ops of ``python -m bench.ops``: local temporal attention, and the memory-bound pieces around attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt import ops
from bench.contenders import Inputs, implementation, sdpa
from bench.harness import Contender, Judge

MASK_ROWS = 8192  # a dense mask is shown up to this many rows: it grows with their square


# --- local temporal attention ----------------------------------------------------------------------------------------


def _seen(frame: int, num_frames: int, radius: int, size: int) -> slice:
    return slice(max(frame - radius, 0) * size, min(frame + radius + 1, num_frames) * size)


def per_frame(x: Inputs, num_frames: int, radius: int) -> Tensor:
    """One SDPA call per frame, over its neighbours and the reference."""
    size, parts = x.q.shape[1] // num_frames, []
    for f in range(num_frames):
        seen = _seen(f, num_frames, radius, size)
        keys, values = torch.cat([x.k[:, seen], x.ref_k], 1), torch.cat([x.v[:, seen], x.ref_v], 1)
        q = x.q[:, f * size : (f + 1) * size]
        parts.append(sdpa(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)))
    return torch.cat(parts, 1)


def masked(x: Inputs, num_frames: int, radius: int) -> Callable[[], Tensor]:
    """One SDPA call under a dense mask, made beforehand."""
    rows = x.q.shape[1]
    frame = torch.arange(rows, device=x.q.device) // (rows // num_frames)
    near = (frame[:, None] - frame).abs() <= radius
    mask = torch.cat([near, near.new_ones(rows, x.ref_k.shape[1])], 1)

    def call() -> Tensor:
        keys, values = torch.cat([x.k, x.ref_k], 1), torch.cat([x.v, x.ref_v], 1)
        return sdpa(x.q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)

    return call


def local(x: Inputs, num_frames: int, radius: int) -> tuple[list[Contender], Judge, float]:
    """Contenders, the judge, and the FLOPs of the attended pairs."""
    rows, heads_dim = x.q.shape[1], x.q.shape[2] * x.q.shape[3]
    size = rows // num_frames
    seen = [_seen(f, num_frames, radius, size) for f in range(num_frames)]
    pairs = sum(size * (s.stop - s.start) for s in seen) + rows * x.ref_k.shape[1]

    def call() -> Tensor:
        return ops.local_temporal_attention(*x, num_frames=num_frames, radius=radius)

    ran = implementation("local_temporal_attention", *x, num_frames, radius, x.q.shape[-1] ** -0.5)
    found = [
        Contender("ours", call, kind="ours", notes={"implementation": ran}),
        Contender("torch SDPA per frame", lambda: per_frame(x, num_frames, radius), kind="baseline"),
    ]
    if rows <= MASK_ROWS:
        dense = rows * (rows + x.ref_k.shape[1]) / pairs
        found.append(Contender("torch SDPA under a mask", masked(x, num_frames, radius), pairs=dense))
    with ops.force("local_temporal_attention", "reference"):
        truth = ops.local_temporal_attention(*(t.double() for t in x), num_frames=num_frames, radius=radius)
    return found, Judge([truth], [per_frame(x, num_frames, radius)]), 4.0 * x.q.shape[0] * heads_dim * pairs


# --- norms, rotation, modulation, gates ------------------------------------------------------------------------------


def _by_torch(name: str, *args: Any) -> Tensor:
    """Each piece as torch users write it, in the dtype of its inputs wherever that is safe."""
    if name == "qk_norm_rope":
        x, weight, cos, sin = args
        wide = F.rms_norm(x.float().flatten(2), (x.shape[2] * x.shape[3],), weight.float(), 1e-6).view(x.shape)
        a, b = wide[..., ::2], wide[..., 1::2]
        c, s = cos[:, None], sin[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(x.dtype)
    if name == "layernorm_modulate":
        x, shift, scale = args
        rows = x.shape[1] // shift.shape[1]
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        return (normed * (1 + scale.repeat_interleave(rows, 1)) + shift.repeat_interleave(rows, 1)).to(x.dtype)
    x, y, gate = args
    return (x.float() + y.float() * gate.repeat_interleave(x.shape[1] // gate.shape[1], 1)).to(x.dtype)


def pieces(
    rows: int, frames: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> list[tuple[str, list[Contender], Judge, tuple[int, int]]]:
    """Per op: its name, contenders, judge, and (FLOPs, bytes) as the op's own cost function says."""
    generator, channels = torch.Generator().manual_seed(3), heads * dim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x, y = normal(1, rows, channels).to(dtype), normal(1, rows, channels).to(dtype)
    shift, scale, gate = (normal(1, frames, channels) for _ in range(3))
    angle = normal(rows, dim // 2)
    calls: list[tuple[str, tuple[Tensor, ...], tuple[Any, ...]]] = [
        ("qk_norm_rope", (x.view(1, rows, heads, dim), normal(channels), angle.cos(), angle.sin()), (1e-6,)),
        ("layernorm_modulate", (x, shift, scale), (None, 1e-6)),
        ("gate_residual", (x, y, gate), (None,)),
    ]
    found = []
    for name, tensors, rest in calls:
        op = getattr(ops, name)
        ran = implementation(name, *tensors, *rest)
        with ops.force(name, "reference"):
            truth = op(*(t.double() for t in tensors))
        contenders = [
            Contender("ours", lambda op=op, t=tensors: op(*t), kind="ours", notes={"implementation": ran}),
            Contender("torch, piece by piece", lambda n=name, t=tensors: _by_torch(n, *t), kind="baseline"),
        ]
        judge = Judge([truth], [_by_torch(name, *tensors)])
        found.append((name, contenders, judge, ops.cost(name, *tensors, *rest)))
    return found
