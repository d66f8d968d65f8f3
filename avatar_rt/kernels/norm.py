"""The memory-bound pieces around attention: one program per token, one read and one write of it, all in fp32 between.

qk_norm_rope:        y = x * rsqrt(mean(x^2) + eps) * weight over all heads, then pairs (2i, 2i+1) turned by cos, sin.
layernorm_modulate:  y = (x - mean) * rsqrt(var + eps) * (1 + scale_t) + shift_t.
gate_residual:       z = x + y * gate_t.
t is the token's frame: ``index`` at the token, or the token over tokens per frame. A frame outside 0..T-1 gives NaN and
reads nothing. Bound by memory bandwidth.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avatar_rt.kernels._launch import Launch, power_of_two, strides


@triton.jit
def qk_norm_rope_kernel(
    x, weight, cos, sin, out, x_b, x_l, x_n, cos_l, sin_l, out_b, out_l, out_n, eps,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """x, out: [B, L, N, D] with D contiguous. Grid: (L, B, 1)."""
    row, b = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    n = tl.cast(tl.arange(0, HEADS_PAD)[:, None], tl.int64)  # heads may lie far apart
    d = tl.arange(0, DIM_PAD)[None, :]
    inside = (n < HEADS) & (d < DIM)
    token = tl.load(x + b * x_b + row * x_l + n * x_n + d, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + n * DIM + d, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(token * token, 1), 0)
    token = token * tl.rsqrt(square / (HEADS * DIM) + eps) * gain
    even, odd = tl.split(tl.reshape(token, [HEADS_PAD, DIM_PAD // 2, 2]))
    pair = tl.arange(0, DIM_PAD // 2)
    c = tl.load(cos + row * cos_l + pair, mask=pair < DIM // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * sin_l + pair, mask=pair < DIM // 2, other=0.0).to(tl.float32)[None, :]
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [HEADS_PAD, DIM_PAD])
    tl.store(out + b * out_b + row * out_l + n * out_n + d, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _frame(index, row, rows_per_frame, frames, HAS_INDEX: tl.constexpr):
    """(the token's frame, whether there is such a frame)."""
    if HAS_INDEX:
        frame = tl.load(index + row)
    else:
        frame = row // rows_per_frame
    return frame, (frame >= 0) & (frame < frames)


@triton.jit(do_not_specialize=["rows_per_frame", "frames"])
def layernorm_modulate_kernel(
    x, shift, scale, index, out, x_b, x_l, shift_b, shift_t, scale_b, scale_t, out_b, out_l,
    rows_per_frame, frames, eps, HAS_INDEX: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """x, out: [B, L, C]; shift, scale: [B, T, C]; C contiguous. Grid: (L, B, 1)."""
    row, b = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    c = tl.arange(0, WIDTH_PAD)
    inside = c < WIDTH
    frame, known = _frame(index, row, rows_per_frame, frames, HAS_INDEX)
    token = tl.load(x + b * x_b + row * x_l + c, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(scale + b * scale_b + frame * scale_t + c, mask=inside & known, other=float("nan")).to(tl.float32)
    offset = tl.load(shift + b * shift_b + frame * shift_t + c, mask=inside & known, other=float("nan")).to(tl.float32)
    centred = tl.where(inside, token - tl.sum(token, 0) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(out + b * out_b + row * out_l + c, (normed * (1 + gain) + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_per_frame", "frames"])
def gate_residual_kernel(
    x, y, gate, index, out, x_b, x_l, y_b, y_l, gate_b, gate_t, out_b, out_l,
    rows_per_frame, frames, HAS_INDEX: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """x, y, out: [B, L, C]; gate: [B, T, C]; C contiguous. Grid: (L, B, 1)."""
    row, b = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    c = tl.arange(0, WIDTH_PAD)
    inside = c < WIDTH
    frame, known = _frame(index, row, rows_per_frame, frames, HAS_INDEX)
    token = tl.load(x + b * x_b + row * x_l + c, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(y + b * y_b + row * y_l + c, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + b * gate_b + frame * gate_t + c, mask=inside & known, other=float("nan")).to(tl.float32)
    tl.store(out + b * out_b + row * out_l + c, (token + branch * factor).to(out.dtype.element_ty), mask=inside)


# --- host ------------------------------------------------------------------------------------------------------------


def _warps(elements: int) -> int:
    """Warps for a row of ``elements``: 16 elements per thread, 1 to 16 warps."""
    return min(max(elements // 512, 1), 16)


def qk_norm_rope_launch(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor) -> Launch:
    """Shapes as in ``qk_norm_rope``."""
    batch, rows, heads, dim = x.shape
    args: dict[str, Any] = {"x": x, "weight": weight, "cos": cos, "sin": sin, "out": out, "eps": eps}
    args |= strides("x", x, "bln") | strides("cos", cos, "l") | strides("sin", sin, "l") | strides("out", out, "bln")
    pads: dict[str, int] = {"HEADS": heads, "HEADS_PAD": power_of_two(heads), "DIM": dim, "DIM_PAD": power_of_two(dim)}
    return Launch(
        qk_norm_rope_kernel, (rows, batch, 1), args | pads, _warps(pads["HEADS_PAD"] * pads["DIM_PAD"])
    )  # fmt: skip


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """RMSNorm over all heads together, then rotation.

    Args:
        x: [B, L, N, D], D even and contiguous. weight: [N*D] contiguous. cos, sin: [L, D/2], D/2 contiguous.
        out: Where to write [B, L, N, D], D contiguous, other strides free: the rows of a reference cache
            [layers, B, R, N, D], say. None: a new tensor.

    Returns: ``out``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    qk_norm_rope_launch(x, weight, cos, sin, eps, out).run()
    return out


def _frame_args(x: Tensor, rows: Tensor, index: Tensor | None, out: Tensor) -> dict[str, Any]:
    return {
        "index": x if index is None else index,
        "rows_per_frame": max(x.shape[1] // max(rows.shape[1], 1), 1),
        "frames": rows.shape[1],
        "HAS_INDEX": index is not None,
        "WIDTH": x.shape[2],
        "WIDTH_PAD": power_of_two(x.shape[2]),
    } | strides("out", out, "bl")


def layernorm_modulate_launch(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float, out: Tensor
) -> Launch:
    """Shapes as in ``layernorm_modulate``."""
    args: dict[str, Any] = {"x": x, "shift": shift, "scale": scale, "out": out, "eps": eps} | strides("x", x, "bl")
    args |= strides("shift", shift, "bt") | strides("scale", scale, "bt") | _frame_args(x, shift, index, out)
    return Launch(layernorm_modulate_kernel, (x.shape[1], x.shape[0], 1), args, _warps(args["WIDTH_PAD"]))


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    """LayerNorm without affine, then the frame's modulation.

    Args:
        x: [B, L, C]. shift, scale: [B, T, C]. C contiguous in all, dtypes free.
        index: [L] int64 contiguous, or None: token i is in frame i // (L / T).

    Returns: [B, L, C] in the dtype of ``x``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layernorm_modulate_launch(x, shift, scale, index, eps, out).run()
    return out


def gate_residual_launch(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None, out: Tensor) -> Launch:
    """Shapes as in ``gate_residual``."""
    args: dict[str, Any] = {"x": x, "y": y, "gate": gate, "out": out} | strides("x", x, "bl") | strides("y", y, "bl")
    args |= strides("gate", gate, "bt") | _frame_args(x, gate, index, out)
    return Launch(gate_residual_kernel, (x.shape[1], x.shape[0], 1), args, _warps(args["WIDTH_PAD"]))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """``x + y * gate``, each token with its frame's gate; shapes as in ``layernorm_modulate``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate_residual_launch(x, y, gate, index, out).run()
    return out
