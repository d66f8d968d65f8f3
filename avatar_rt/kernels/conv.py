"""The past of a causal convolution: [state ; x] and the next state in one pass over ``x``.

A frame of [state ; x] is copied once and, if it is one of the last kt - 1, stored a second time as the next state; cat
and clone would read those frames again. Bound by memory bandwidth.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avatar_rt.kernels._launch import Launch, strides

_PLANE = 1024  # elements of a height x width plane per program


@triton.jit(do_not_specialize=["frames"])
def with_past_kernel(
    x, state, past, new_state, x_b, x_c, x_t, state_b, state_c, state_t, channels, frames, plane,
    HAS_STATE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """past: [B, C, KEEP + T, plane], new_state: [B, C, KEEP, plane], contiguous. Grid: (B * C, KEEP + T, tiles)."""
    both, t = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    b, c = both // channels, both % channels
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    value = tl.load(x + b * x_b + c * x_c + (t - KEEP) * x_t + at, mask=inside & (t >= KEEP), other=0.0)
    if HAS_STATE:
        old = tl.load(state + b * state_b + c * state_c + t * state_t + at, mask=inside & (t < KEEP), other=0.0)
        value = tl.where(t < KEEP, old, value)
    tl.store(past + (both * (KEEP + frames) + t) * plane + at, value, mask=inside)
    tl.store(new_state + (both * KEEP + t - frames) * plane + at, value, mask=inside & (t >= frames))


def with_past_launch(x: Tensor, state: Tensor | None, past: Tensor, new_state: Tensor) -> Launch:
    """Shapes as in ``with_past``."""
    batch, channels, frames, height, width = x.shape
    args: dict[str, Any] = {"x": x, "state": x if state is None else state, "past": past, "new_state": new_state}
    args |= strides("x", x, "bct") | strides("state", args["state"], "bct")
    args |= {"channels": channels, "frames": frames, "plane": height * width, "HAS_STATE": state is not None}
    grid = (batch * channels, past.shape[2], triton.cdiv(height * width, _PLANE))
    return Launch(with_past_kernel, grid, args | {"KEEP": new_state.shape[2], "BLOCK": _PLANE})


def with_past(x: Tensor, state: Tensor | None, kt: int) -> tuple[Tensor, Tensor]:
    """What a causal convolution reads, and what the next call of it needs.

    Args:
        x: [B, C, T, H, W], H and W contiguous. state: [B, C, kt-1, H, W] likewise, or None for zeros.
        kt: Kernel size in time, 2 or more.

    Returns: [state ; x] as [B, C, kt-1 + T, H, W] and its last kt-1 frames.
    """
    batch, channels, frames, height, width = x.shape
    past = torch.empty((batch, channels, kt - 1 + frames, height, width), dtype=x.dtype, device=x.device)
    new_state = torch.empty((batch, channels, kt - 1, height, width), dtype=x.dtype, device=x.device)
    with_past_launch(x, state, past, new_state).run()
    return past, new_state
