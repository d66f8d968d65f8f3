"""Attention over key/value segments: the cached reference and the fresh tokens, under one softmax."""

from typing import Any

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import _check, _cuda, _dispatch, _load, _triton
from avatar_rt.ops import packed as _packing
from avatar_rt.ops._attention_backward import MAX_HEAD_DIM, Segments, backward, band, segments_of, setup_context, wide
from avatar_rt.ops._dispatch import Implementation
from avatar_rt.ops.packed import PackedReference


def sparse_reference_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None = None,
    ref_v: Tensor | None = None,
    *,
    packed: PackedReference | None = None,
    scale: float | None = None,
    strength: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from ``q`` to the rows of [k ; ref_k] with one softmax; nothing is concatenated, no mask is made.

    Args:
        q: [B, L, N, D] fp32 or bf16, D contiguous, other strides free.
        k, v: [B, S, N, D], the fresh rows; both None to see the reference only.
        ref_k, ref_v: [B, R, N, D], the reference rows; both None to see the fresh rows only.
        packed: The reference rows from ``pack_reference``, instead of ``ref_k`` and ``ref_v``; no gradients then.
        scale: Factor on the scores, above 0; default D ** -0.5.
        strength: Factor on each reference row's softmax weight, before normalising; 0: as if there were no reference.
        return_lse: Also return the natural-log sum of exponentials of each query's scores.

    Returns: [B, L, N, D], dtype of ``q``, accumulated in fp32; with ``return_lse`` also [B, N, L] fp32
        (both in fp64 for fp64 inputs).
    Raises: InputError on a shape, dtype or device above; UnsupportedError when no implementation can run
            or a gradient is wanted through a packed reference.
    """
    q, k, v, ref_k, ref_v = _autocast(q, k, v, ref_k, ref_v)
    if packed is not None:
        out, lse = _attend_packed(q, k, v, ref_k, ref_v, packed, scale, strength)
    else:
        scale = _check_inputs(q, k, v, ref_k, ref_v, scale, strength)
        out, lse = torch.ops.avatar_rt.sparse_reference_attention(q, k, v, ref_k, ref_v, scale, float(strength))
    return (out, lse) if return_lse else out


def local_temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ref_k: Tensor | None = None,
    ref_v: Tensor | None = None,
    *,
    num_frames: int,
    radius: int,
    scale: float | None = None,
    strength: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within a band of frames in time (all of space) and to every reference row, with one softmax.

    Args:
        q, k, v: [B, L, N, D] fp32 or bf16, frame after frame: row i is in frame i // (L / num_frames).
        ref_k, ref_v: [B, R, N, D] or both None.
        num_frames: Frames in L; L is a multiple of it.
        radius: A row of frame f sees the fresh rows of frames f - radius .. f + radius.
        scale, strength, return_lse: As in ``sparse_reference_attention``.

    Returns: As ``sparse_reference_attention``.
    Raises: InputError on a shape, dtype or device above; UnsupportedError when no implementation can run.
    """
    q, k, v, ref_k, ref_v = _autocast(q, k, v, ref_k, ref_v)
    if k is None or v is None:
        raise InputError("k: expected a tensor [B, L, N, D], got None")
    scale = _check_inputs(q, k, v, ref_k, ref_v, scale, strength)
    if k.shape[1] != q.shape[1]:
        raise InputError(f"k: expected L={q.shape[1]} rows as in q, got {k.shape[1]}")
    if num_frames < 1 or q.shape[1] % num_frames:
        raise InputError(f"num_frames: expected a divisor of L={q.shape[1]}, got {num_frames}")
    if radius < 0:
        raise InputError(f"radius: expected 0 or more frames, got {radius}")
    out, lse = torch.ops.avatar_rt.local_temporal_attention(
        q, k, v, ref_k, ref_v, num_frames, radius, scale, float(strength)
    )
    return (out, lse) if return_lse else out


def _attend_packed(q, k, v, ref_k, ref_v, packed: PackedReference, scale, strength) -> tuple[Tensor, Tensor]:
    if ref_k is not None or ref_v is not None:
        raise InputError("packed: expected None beside ref_k and ref_v, got a PackedReference")
    _check.shape("q", q, "B L N D", {})
    _packing.check(packed, q)
    scale = _check_inputs(q, k, v, None, None, scale, strength, packed.rows)
    _packing.refuse_gradients("sparse_reference_attention", q=q, k=k, v=v)
    return torch.ops.avatar_rt.packed_reference_attention(q, k, v, *packed, scale, float(strength))


def _autocast(q: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    dtype = _check.autocast_dtype(q) if isinstance(q, Tensor) else None
    return tuple(x if x is None or dtype is None else x.to(dtype) for x in (q, *rest))


def _check_inputs(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    scale: float | None,
    strength: float,
    ref_rows: int = 0,
) -> float:
    sizes: dict[str, int] = {}
    _check.shape("q", q, "B L N D", sizes)
    _check.floating("q", q)
    _check.rows_contiguous("q", q)
    rows = {"S": 0, "R": ref_rows}
    for letter, names, pair in (("S", ("k", "v"), (k, v)), ("R", ("ref_k", "ref_v"), (ref_k, ref_v))):
        if pair[0] is None and pair[1] is None:
            continue
        for name, other, x in zip(names, reversed(names), pair, strict=True):
            if x is None:
                raise InputError(f"{name}: expected a tensor beside {other}, got None")
            _check.shape(name, x, f"B {letter} N D", sizes)
            _check.same_dtype(name, x, "q", q)
            _check.rows_contiguous(name, x)
        rows[letter] = sizes[letter]
    _check.strength(strength)
    if sum(rows.values()) == 0:
        raise InputError("k, ref_k: expected at least one key row, got none")
    if strength == 0 and rows["S"] == 0:
        raise InputError("k: expected at least one fresh row at strength 0, got none")
    if scale is None:
        return sizes["D"] ** -0.5
    _check.positive("scale", scale)
    return float(scale)


# --- definition ------------------------------------------------------------------------------------------------------


def _attend(q: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    q_wide = wide(q)
    parts = [(q_wide @ wide(k).transpose(-1, -2)).mul_(scale).add_(bias) for k, _, bias in segments]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse[..., None]).exp_().split([k.shape[1] for k, _, _ in segments], -1)
    out = sum(p @ wide(v) for p, (_, v, _) in zip(weights, segments, strict=True))
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def _sparse_ref(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    scale: float,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return _attend(q, segments_of(k, v, ref_k, ref_v, strength), scale)


def _local_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    parts = []
    for frame in range(num_frames):
        own, seen = band(frame, num_frames, radius, q.shape[1])
        parts.append(_attend(q[:, own], segments_of(k[:, seen], v[:, seen], ref_k, ref_v, strength), scale))
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


# --- cost ------------------------------------------------------------------------------------------------------------


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _sparse_cost(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    scale: float,
    strength: float = 1.0,
) -> tuple[int, int]:
    """FLOPs (two products per attended pair) and bytes (every operand once, out and LSE)."""
    rows = sum(x.shape[1] for x in (k, ref_k) if x is not None)
    lse_bytes = 4 * q.shape[0] * q.shape[1] * q.shape[2]
    return 4 * q.numel() * rows, _bytes(q, k, v, ref_k, ref_v, q) + lse_bytes


def _local_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float = 1.0,
) -> tuple[int, int]:
    frames = sum(min(f + radius + 1, num_frames) - max(f - radius, 0) for f in range(num_frames))
    pairs = frames * (q.shape[1] // num_frames) ** 2 + q.shape[1] * (0 if ref_k is None else ref_k.shape[1])
    _, moved = _sparse_cost(q, k, v, ref_k, ref_v, scale, strength)
    return 4 * q.shape[0] * q.shape[2] * q.shape[3] * pairs, moved


# --- implementations -------------------------------------------------------------------------------------------------


def _refuses_cpu(q: Tensor, *rest) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(q.dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"D={q.shape[-1]} is above {MAX_HEAD_DIM}"
    return _load.native()[1] or None


def _refuses_reference(*args) -> str | None:
    return None


def run_native(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float = 1.0,
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; ``isa`` and ``num_threads`` (default: the best, torch's) are for tests and benchmarks."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    tensors = [_load.arg(x) for x in (q, k, v, ref_k, ref_v)]
    threads = num_threads or torch.get_num_threads()
    _load.module().attention(
        *tensors, out.data_ptr(), lse.data_ptr(), scale, num_frames, radius, threads, isa, strength
    )
    return out, lse


def _sparse_cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    scale: float,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return run_native(q, k, v, ref_k, ref_v, 1, 0, scale, strength)


_dispatch.register(
    "sparse_reference_attention",
    _sparse_cost,
    Implementation("cuda", _cuda.refuses_attention, _cuda.sparse_attention),
    Implementation("triton", _triton.refuses_attention, _triton.sparse_attention),
    Implementation("cpu", _refuses_cpu, _sparse_cpu),
    Implementation("reference", _refuses_reference, _sparse_ref, by_choice=False),
)
_dispatch.register(
    "local_temporal_attention",
    _local_cost,
    Implementation("cuda", _cuda.refuses_attention, _cuda.attention),
    Implementation("triton", _triton.refuses_attention, _triton.local_attention),
    Implementation("cpu", _refuses_cpu, run_native),
    Implementation("reference", _refuses_reference, _local_ref, by_choice=False),
)


@torch.library.custom_op(
    "avatar_rt::sparse_reference_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor? v, Tensor? ref_k, Tensor? ref_v, float scale, float strength)"
    " -> (Tensor, Tensor)",
)
def _sparse_op(q, k, v, ref_k, ref_v, scale, strength):
    return _dispatch.run("sparse_reference_attention", q, k, v, ref_k, ref_v, scale, strength)


@torch.library.custom_op(
    "avatar_rt::local_temporal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? ref_k, Tensor? ref_v, int num_frames, int radius, float scale,"
    " float strength) -> (Tensor, Tensor)",
)
def _local_op(q, k, v, ref_k, ref_v, num_frames, radius, scale, strength):
    return _dispatch.run("local_temporal_attention", q, k, v, ref_k, ref_v, num_frames, radius, scale, strength)


def _fake(q, k, v, ref_k, ref_v, *rest):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)


for _op in (_sparse_op, _local_op):
    _op.register_fake(_fake)
    _op.register_autograd(backward, setup_context=setup_context)
