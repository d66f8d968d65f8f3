"""Attention over key/value segments, backward: weights are remade from the saved LSE, segment by segment.

With P = exp(S - LSE) and dP = dO V^T:  dV = P^T dO,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q, where
delta = rowsum(dO * O) - dLSE (arXiv 2205.14135; the gradient that came through the LSE joins delta). One kernel makes a
tile of dQ walking the keys as the forward does, another a tile of dK and dV walking the queries that see it. A result
has one owner, who adds in one order: no atomics, the same bits each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avatar_rt.kernels._launch import Config, Launch, arch_of, power_of_two, strides
from avatar_rt.kernels.attention import band, load_rows, pick, segment_args, shape_args, store_rows, tile_of_frame

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# As in attention.py.
_DQ_TILES = {
    "large": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2)},
    "middle": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2)},
    "small": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2)},
    "fp32": {64: Config(16, 16, 8, 1), 128: Config(16, 16, 8, 1)},
}
_DKV_TILES = {
    "large": {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2)},
    "middle": {64: Config(32, 128, 8, 2), 128: Config(16, 128, 8, 2)},
    "small": {64: Config(32, 128, 8, 2), 128: Config(16, 128, 8, 2)},
    "fp32": {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1)},
}
_DELTA_ROWS = 32


@triton.jit(do_not_specialize=["q_rows"])
def delta_kernel(grad, out, grad_lse, delta, grad_b, grad_l, grad_n, out_b, out_l, out_n, q_rows,
                 HAS_GRAD_LSE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta [B, N, L] = rowsum(dO * O) - dLSE. Grid: (tiles, N, B)."""
    start = tl.program_id(0) * ROWS
    n, b = tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    grad_tile = load_rows(grad + b * grad_b + n * grad_n, grad_l, start, q_rows, ROWS, DIM, DIM_PAD, True)
    out_tile = load_rows(out + b * out_b + n * out_n, out_l, start, q_rows, ROWS, DIM, DIM_PAD, True)
    total = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    rows = start + tl.arange(0, ROWS)
    at = (b * tl.num_programs(1) + n) * q_rows + rows
    if HAS_GRAD_LSE:
        total -= tl.load(grad_lse + at, mask=rows < q_rows, other=0.0)
    tl.store(delta + at, total, mask=rows < q_rows)


# --- dQ --------------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_visit(dq, q, grad, shift, delta, k, k_l, v, v_l, start, stop, scale,
              KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    k_tile = load_rows(k, k_l, start, stop, KEYS, DIM, DIM_PAD, MASKED)
    v_tile = load_rows(v, v_l, start, stop, KEYS, DIM, DIM_PAD, MASKED)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
    p = tl.exp2(s * scale - shift[:, None])
    if MASKED:  # a zero key still has a weight, which may overflow where all true scores are very low
        p = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], p, 0.0)
    dp = tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
    return tl.dot(ds, k_tile, dq, input_precision=PRECISION)


@triton.jit
def _dq_segment(dq, q, grad, shift, delta, k, k_l, v, v_l, low, high, scale,
                KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    whole = low + (high - low) // KEYS * KEYS
    for start in tl.range(low, whole, KEYS):
        dq = _dq_visit(
            dq, q, grad, shift, delta, k, k_l, v, v_l, start, high, scale, KEYS, DIM, DIM_PAD, PRECISION, False
        )
    if whole < high:
        dq = _dq_visit(
            dq, q, grad, shift, delta, k, k_l, v, v_l, whole, high, scale, KEYS, DIM, DIM_PAD, PRECISION, True
        )
    return dq


@triton.jit(do_not_specialize=["q_rows", "q_size", "k_size", "num_frames", "radius", "ref_rows"])
def dq_kernel(
    q, k, v, ref_k, ref_v, grad, lse, delta, dq,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, ref_k_b, ref_k_l, ref_k_n, ref_v_b, ref_v_l, ref_v_n,
    grad_b, grad_l, grad_n, dq_b, dq_l, dq_n,
    q_rows, q_size, k_size, num_frames, radius, ref_rows, scale, ref_bias,
    HAS_FRESH: tl.constexpr, HAS_REF: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of all frames, N, B); ``scale`` includes log2(e)."""
    frame, start, stop = tile_of_frame(q_size, ROWS)
    n, b = tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    q_tile = load_rows(q + b * q_b + n * q_n, q_l, start, stop, ROWS, DIM, DIM_PAD, True)
    grad_tile = load_rows(grad + b * grad_b + n * grad_n, grad_l, start, stop, ROWS, DIM, DIM_PAD, True)
    rows = start + tl.arange(0, ROWS)
    at = (b * tl.num_programs(1) + n) * q_rows + rows
    shift = tl.load(lse + at, mask=rows < stop, other=0.0) * LOG2E
    delta_tile = tl.load(delta + at, mask=rows < stop, other=0.0)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if HAS_FRESH:
        low, high = band(frame, num_frames, radius, k_size)
        acc = _dq_segment(
            acc, q_tile, grad_tile, shift, delta_tile, k + b * k_b + n * k_n, k_l, v + b * v_b + n * v_n, v_l,
            low, high, scale, KEYS, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
    if HAS_REF:
        acc = _dq_segment(
            acc, q_tile, grad_tile, shift - ref_bias, delta_tile, ref_k + b * ref_k_b + n * ref_k_n, ref_k_l,
            ref_v + b * ref_v_b + n * ref_v_n, ref_v_l, 0, ref_rows, scale, KEYS, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
    store_rows(dq + b * dq_b + n * dq_n, dq_l, start, stop, acc * (scale * LN2), ROWS, DIM, DIM_PAD)


# --- dK, dV ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["q_rows", "q_size", "k_size", "num_frames", "radius"])
def dkv_kernel(
    q, k, v, grad, lse, delta, dk, dv,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, grad_b, grad_l, grad_n, dk_b, dk_l, dk_n, dv_b, dv_l, dv_n,
    q_rows, q_size, k_size, num_frames, radius, scale, bias,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment. Grid: (tiles of all key frames, N, B). The band is symmetric: who is seen by f is whom f sees."""
    frame, start, stop = tile_of_frame(k_size, KEYS)
    n, b = tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    k_tile = load_rows(k + b * k_b + n * k_n, k_l, start, stop, KEYS, DIM, DIM_PAD, True)
    v_tile = load_rows(v + b * v_b + n * v_n, v_l, start, stop, KEYS, DIM, DIM_PAD, True)
    q += b * q_b + n * q_n
    grad += b * grad_b + n * grad_n
    lse += (b * tl.num_programs(1) + n) * q_rows
    delta += (b * tl.num_programs(1) + n) * q_rows
    dk_tile = tl.zeros([KEYS, DIM_PAD], tl.float32)
    dv_tile = tl.zeros([KEYS, DIM_PAD], tl.float32)
    low, high = band(frame, num_frames, radius, q_size)
    for at in tl.range(low, high, ROWS):  # only loads are masked, which is free; a second body would spill registers
        q_tile = load_rows(q, q_l, at, high, ROWS, DIM, DIM_PAD, True)
        grad_tile = load_rows(grad, grad_l, at, high, ROWS, DIM, DIM_PAD, True)
        rows = at + tl.arange(0, ROWS)
        shift = tl.load(lse + rows, mask=rows < high, other=float("inf"))  # a weight of 0
        delta_tile = tl.load(delta + rows, mask=rows < high, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        p = tl.exp2(s * scale - (shift * LOG2E - bias)[None, :])
        dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        ds = (p * (dp - delta_tile[None, :])).to(q_tile.dtype)
        dk_tile = tl.dot(ds, q_tile, dk_tile, input_precision=PRECISION)
    store_rows(dk + b * dk_b + n * dk_n, dk_l, start, stop, dk_tile * (scale * LN2), KEYS, DIM, DIM_PAD)
    store_rows(dv + b * dv_b + n * dv_n, dv_l, start, stop, dv_tile, KEYS, DIM, DIM_PAD)


# --- host ------------------------------------------------------------------------------------------------------------


def delta_launch(grad: Tensor, grad_lse: Tensor | None, out: Tensor, delta: Tensor) -> Launch:
    """delta [B, N, L] from [B, L, N, D] gradient and output, and the LSE's gradient [B, N, L] contiguous, if any."""
    batch, rows, heads, dim = out.shape
    args: dict[str, Any] = {
        "grad": grad,
        "out": out,
        "grad_lse": delta if grad_lse is None else grad_lse,
        "delta": delta,
    }
    args |= strides("grad", grad, "bln") | strides("out", out, "bln")
    args |= {"q_rows": rows, "HAS_GRAD_LSE": grad_lse is not None, "DIM": dim, "DIM_PAD": power_of_two(dim, 16)}
    return Launch(delta_kernel, (triton.cdiv(rows, _DELTA_ROWS), heads, batch), args | {"ROWS": _DELTA_ROWS})


def dq_launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None, grad: Tensor,
    lse: Tensor, delta: Tensor, dq: Tensor, num_frames: int, radius: int, scale: float, ref_bias: float, arch: int,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """The query gradient's launch for a GPU of compute capability ``arch``."""
    config = config or pick(_DQ_TILES, arch, q.dtype, q.shape[3])
    args = segment_args(q, k, v, ref_k, ref_v, ref_bias) | shape_args(q, k, num_frames, radius, scale)
    args |= {"grad": grad, "lse": lse, "delta": delta, "dq": dq} | strides("grad", grad, "bln")
    args |= strides("dq", dq, "bln") | {"ROWS": config.rows, "KEYS": config.keys}
    grid = (num_frames * triton.cdiv(args["q_size"], config.rows), q.shape[2], q.shape[0])
    return Launch(dq_kernel, grid, args, config.num_warps, config.num_stages)


def dkv_launch(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    num_frames: int, radius: int, scale: float, bias: float, arch: int, config: Config | None = None,
) -> Launch:  # fmt: skip
    """The launch for the gradients of one segment's keys and values."""
    config = config or pick(_DKV_TILES, arch, q.dtype, q.shape[3])
    args = shape_args(q, k, num_frames, radius, scale) | {"bias": float(bias)}
    tensors = {"q": q, "k": k, "v": v, "grad": grad, "dk": dk, "dv": dv}
    for name, x in tensors.items():
        args |= {name: x, **strides(name, x, "bln")}
    args |= {"lse": lse, "delta": delta, "ROWS": config.rows, "KEYS": config.keys}
    grid = (num_frames * triton.cdiv(args["k_size"], config.keys), q.shape[2], q.shape[0])
    return Launch(dkv_kernel, grid, args, config.num_warps, config.num_stages)


def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None,
    ref_v: Tensor | None, out: Tensor, lse: Tensor, num_frames: int, radius: int, scale: float,
    ref_bias: float = 0.0, config: Config | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of ``attention`` for (q, k, v, ref_k, ref_v) in their dtype and shape, None for a missing one.

    Args:
        grad: [B, L, N, D], dtype of ``q``. grad_lse: [B, N, L] fp32 or None.
        out, lse: What the forward returned; the rest as it was called. Scratch: [B, N, L] fp32.
    """
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    delta, arch = torch.empty_like(lse), arch_of(q)
    delta_launch(grad, None if grad_lse is None else grad_lse.contiguous(), out, delta).run()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dq_launch(
        q, k, v, ref_k, ref_v, grad, lse, delta, dq, num_frames, radius, scale, ref_bias, arch, config
    ).run()  # fmt: skip
    grads: list[Tensor | None] = [dq]
    for keys, values, frames, reach, bias in (
        (k, v, num_frames, radius, 0.0), (ref_k, ref_v, 1, 0, ref_bias)
    ):  # fmt: skip
        if keys is None or values is None:
            grads += (None, None)
        elif bias == float("-inf"):
            grads += (torch.zeros_like(keys), torch.zeros_like(values))
        else:
            dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (keys, values))
            dkv_launch(q, keys, values, grad, lse, delta, dk, dv, frames, reach, scale, bias, arch, config).run()
            grads += (dk, dv)
    return tuple(grads)
