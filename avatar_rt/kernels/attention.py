"""Attention over key/value segments, forward: out = softmax(scale Q [K ; K_ref]^T + bias) [V ; V_ref], with LSE.

One program makes one tile of query rows of one head. Tiles never cross a frame, so all rows of a tile see the same
band of fresh keys: the walk over a segment is a loop of whole tiles and one masked tile at its end, and no mask tensor
exists. Both segments are read where they lie. The softmax is online (arXiv 2205.14135) and in powers of two: scores are
scaled by scale * log2(e), and ``ref_bias`` = log2(strength) is added to those of the reference.
Bound by the matrix units at head dim 128, by the exponential on Hopper at 64.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avatar_rt.kernels._launch import Config, Launch, arch_of, power_of_two, strides

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))

# Tiles by padded head dim for 16-bit dtypes, by what a block may hold in shared memory: ``large`` is 227 KB (sm_90,
# sm_100), ``middle`` 163 KB (sm_80), ``small`` 99 KB (sm_86, sm_89, sm_120). Chosen so that no register is spilled;
# not yet timed on a GPU. fp32 does without matrix units to keep its precision, and has one table for all.
_TILES = {
    "large": {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2)},
    "middle": {64: Config(128, 64, 4, 3), 128: Config(128, 32, 8, 3)},
    "small": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2)},
    "fp32": {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1)},
}
_CLASSES = {9: "large", 10: "large", 8: "small", 12: "small"}
INTERPRETED = Config(32, 32, 4, 1)


def pick(tiles: dict[str, dict[int, Config]], arch: int, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles for a GPU of compute capability ``arch``; 0 is the interpreter."""
    if arch == 0:
        return INTERPRETED
    kind = "fp32" if dtype == torch.float32 else "middle" if arch == 80 else _CLASSES.get(arch // 10, "small")
    return tiles[kind][128 if head_dim > 64 else 64]


# --- device code shared with the backward ----------------------------------------------------------------------------


@triton.jit
def load_rows(base, stride, start, stop, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """[ROWS, DIM_PAD] of one head from row ``start``: zeros beyond DIM, and from row ``stop`` on where MASKED."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    at = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if MASKED:
        if DIM == DIM_PAD:
            return tl.load(at, mask=(start + rows < stop)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(start + rows < stop)[:, None] & (cols < DIM)[None, :], other=0.0)
    else:
        if DIM == DIM_PAD:
            return tl.load(at)
        else:
            return tl.load(at, mask=(cols < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, stride, start, stop, x, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Write [ROWS, DIM_PAD] to rows ``start`` .. ``stop`` of one head."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    at = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(start + rows < stop)[:, None] & (cols < DIM)[None, :])


@triton.jit
def tile_of_frame(size, ROWS: tl.constexpr):
    """(frame, first row, end of the frame) of this program's tile among frames of ``size`` rows."""
    tiles = tl.cdiv(size, ROWS)
    tile = tl.program_id(0)
    frame = tile // tiles
    return frame, frame * size + (tile % tiles) * ROWS, (frame + 1) * size


@triton.jit
def band(frame, num_frames, radius, size):
    """First row and end of the frames within ``radius`` of ``frame``."""
    return tl.maximum(frame - radius, 0) * size, tl.minimum(frame + radius + 1, num_frames) * size


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _visit(acc, top, total, q, k, k_l, v, v_l, start, stop, scale, bias,
           KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """Add one tile of keys to the running (weighted sum, maximum score, sum of weights) of each query row."""
    k_tile = load_rows(k, k_l, start, stop, KEYS, DIM, DIM_PAD, MASKED)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
    if MASKED:
        s = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale + bias)
    p = tl.exp2(s * scale - (new_top - bias)[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    v_tile = load_rows(v, v_l, start, stop, KEYS, DIM, DIM_PAD, MASKED)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _segment(acc, top, total, q, k, k_l, v, v_l, low, high, scale, bias,
             KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Visit rows ``low`` .. ``high``: whole tiles without a mask, then what is left."""
    whole = low + (high - low) // KEYS * KEYS
    for start in tl.range(low, whole, KEYS):
        acc, top, total = _visit(
            acc, top, total, q, k, k_l, v, v_l, start, high, scale, bias, KEYS, DIM, DIM_PAD, PRECISION, False
        )
    if whole < high:
        acc, top, total = _visit(
            acc, top, total, q, k, k_l, v, v_l, whole, high, scale, bias, KEYS, DIM, DIM_PAD, PRECISION, True
        )
    return acc, top, total


@triton.jit(do_not_specialize=["q_rows", "q_size", "k_size", "num_frames", "radius", "ref_rows"])
def attention_kernel(
    q, k, v, ref_k, ref_v, out, lse,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, ref_k_b, ref_k_l, ref_k_n, ref_v_b, ref_v_l, ref_v_n,
    out_b, out_l, out_n,
    q_rows, q_size, k_size, num_frames, radius, ref_rows, scale, ref_bias,
    HAS_FRESH: tl.constexpr, HAS_REF: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of all frames, N, B). ``q_size`` and ``k_size`` are rows per frame; ``scale`` includes log2(e)."""
    frame, start, stop = tile_of_frame(q_size, ROWS)
    n, b = tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    q_tile = load_rows(q + b * q_b + n * q_n, q_l, start, stop, ROWS, DIM, DIM_PAD, True)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_FRESH:
        low, high = band(frame, num_frames, radius, k_size)
        acc, top, total = _segment(
            acc, top, total, q_tile, k + b * k_b + n * k_n, k_l, v + b * v_b + n * v_n, v_l, low, high,
            scale, 0.0, KEYS, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
    if HAS_REF:
        acc, top, total = _segment(
            acc, top, total, q_tile, ref_k + b * ref_k_b + n * ref_k_n, ref_k_l,
            ref_v + b * ref_v_b + n * ref_v_n, ref_v_l, 0, ref_rows, scale, ref_bias, KEYS, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
    store_rows(out + b * out_b + n * out_n, out_l, start, stop, acc / total[:, None], ROWS, DIM, DIM_PAD)
    rows = start + tl.arange(0, ROWS)
    tl.store(lse + (b * tl.num_programs(1) + n) * q_rows + rows, (top + tl.log2(total)) * LN2, mask=rows < stop)


# --- host ------------------------------------------------------------------------------------------------------------


def segment_args(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None, ref_bias: float
) -> dict[str, Any]:
    """Addresses, strides and presence of the segments; one without rows, or of weight 0, is not looked at."""
    fresh = k is not None and k.shape[1] > 0
    reference = ref_k is not None and ref_k.shape[1] > 0 and ref_bias != -math.inf
    names = ("k", "v", "ref_k", "ref_v")
    present = (fresh, fresh, reference, reference)
    pairs = zip((k, v, ref_k, ref_v), present)
    tensors: dict[str, Tensor] = dict(zip(names, (x if has and x is not None else q for x, has in pairs)))
    args: dict[str, Any] = {"q": q, **tensors, **strides("q", q, "bln")}
    for name in names:
        args |= strides(name, tensors[name], "bln")
    args |= {"HAS_FRESH": fresh, "HAS_REF": reference, "ref_rows": tensors["ref_k"].shape[1] if reference else 0}
    args["ref_bias"] = float(ref_bias) if reference else 0.0
    return args


def shape_args(q: Tensor, k: Tensor | None, num_frames: int, radius: int, scale: float) -> dict[str, Any]:
    """Sizes, scale and compile-time constants that forward and backward share."""
    return {
        "q_rows": q.shape[1],
        "q_size": q.shape[1] // num_frames,
        "k_size": 0 if k is None else k.shape[1] // num_frames,
        "num_frames": num_frames,
        "radius": min(radius, num_frames),
        "scale": scale * LOG2E,
        "DIM": q.shape[3],
        "DIM_PAD": power_of_two(q.shape[3], 16),
        "PRECISION": "ieee",  # of fp32 products: TF32 would not keep fp32's promise
    }


def forward_launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None, out: Tensor, lse: Tensor,
    num_frames: int, radius: int, scale: float, ref_bias: float, arch: int, config: Config | None = None,
) -> Launch:  # fmt: skip
    """The forward's launch for a GPU of compute capability ``arch``."""
    config = config or pick(_TILES, arch, q.dtype, q.shape[3])
    args = segment_args(q, k, v, ref_k, ref_v, ref_bias) | shape_args(q, k, num_frames, radius, scale)
    args |= {"out": out, "lse": lse, **strides("out", out, "bln"), "ROWS": config.rows, "KEYS": config.keys}
    grid = (num_frames * triton.cdiv(args["q_size"], config.rows), q.shape[2], q.shape[0])
    return Launch(attention_kernel, grid, args, config.num_warps, config.num_stages)


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None,
    num_frames: int, radius: int, scale: float, ref_bias: float = 0.0, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both attention ops; ``num_frames`` = 1, ``radius`` = 0 is the sparse one.

    Args:
        q: [B, L, N, D] fp32, bf16 or fp16, D contiguous and at most 128.
        k, v: [B, S, N, D] or None. With more than one frame S = L.
        ref_k, ref_v: [B, R, N, D] or None.
        ref_bias: log2 of the reference's strength; -inf leaves the reference out.
        config: Other tiles than the table's; for tests and tuning.

    Returns: out [B, L, N, D] in the dtype of ``q``, LSE [B, N, L] fp32, natural logarithm.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    forward_launch(
        q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale, ref_bias, arch_of(q), config
    ).run()  # fmt: skip
    return out, lse
