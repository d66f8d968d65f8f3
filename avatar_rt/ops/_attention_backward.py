"""Gradients of both attention ops, from the saved output and LSE, and the cutting into segments they share."""

import math

import torch
from torch import Tensor

from avatar_rt.ops import _dispatch, _load, _triton
from avatar_rt.ops._dispatch import Implementation

MAX_HEAD_DIM = 256  # of the CPU kernels

Segments = list[tuple[Tensor, Tensor, float]]


def segments_of(
    k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None, strength: float
) -> Segments:
    """The (keys, values, number added to scores) that hold rows and weigh anything, fresh before reference."""
    found: Segments = []
    if k is not None and v is not None and k.shape[1] > 0:
        found.append((k, v, 0.0))
    if ref_k is not None and ref_v is not None and ref_k.shape[1] > 0 and strength > 0:
        found.append((ref_k, ref_v, math.log(strength)))
    return found


def wide(x: Tensor) -> Tensor:
    """[B, L, N, D] -> [B, N, L, D] in the accumulation dtype: fp32, or fp64 for fp64."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def band(frame: int, num_frames: int, radius: int, rows: int) -> tuple[slice, slice]:
    """Rows of a frame, and the rows that they see, out of ``rows`` in ``num_frames`` frames."""
    size = rows // num_frames
    low, high = max(frame - radius, 0), min(frame + radius + 1, num_frames)
    return slice(frame * size, (frame + 1) * size), slice(low * size, high * size)


def setup_context(ctx, inputs, output) -> None:
    """Save what both ops' backward needs; ``inputs`` end in (scale, strength), after (num_frames, radius) or not."""
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)
    ctx.band, ctx.numbers = inputs[5:-2] or (1, 0), inputs[-2:]
    ctx.save_for_backward(*inputs[:5], *output)


def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients for (q, k, v, ref_k, ref_v) in the inputs' dtype, and None for each number."""
    *inputs, out, lse = ctx.saved_tensors
    nothing = (None,) * (ctx.num_inputs - 5)
    wanted = [need and x is not None for need, x in zip(ctx.needs_input_grad, inputs, strict=False)]
    if (grad is None and grad_lse is None) or not any(wanted):
        return (None,) * 5 + nothing
    grad = torch.zeros_like(out) if grad is None else grad
    found = iter(
        torch.ops.avatar_rt.attention_backward(grad, grad_lse, *inputs, out, lse, *ctx.band, *ctx.numbers, wanted)
    )
    return (*[next(found) if want else None for want in wanted], *nothing)


# --- definition ------------------------------------------------------------------------------------------------------


def _definition(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float,
    wanted: list[bool],
) -> list[Tensor]:
    dq, fresh, reference = torch.zeros_like(q, dtype=lse.dtype), _zeros(k, v, lse), _zeros(ref_k, ref_v, lse)
    for frame in range(num_frames):
        own, seen = band(frame, num_frames, radius, q.shape[1]) if num_frames > 1 else (slice(None), slice(None))
        own_lse = None if grad_lse is None else grad_lse[:, :, own]
        query = (grad[:, own], own_lse, q[:, own], out[:, own], lse[:, :, own], scale)
        if k is not None and v is not None:
            dq[:, own] += _segment_backward(*query, 1.0, k[:, seen], v[:, seen], *[x[:, seen] for x in fresh])
        if ref_k is not None and ref_v is not None and strength > 0:
            dq[:, own] += _segment_backward(*query, strength, ref_k, ref_v, *reference)
    grads = (dq, *(fresh or (None, None)), *(reference or (None, None)))
    return [g.to(q.dtype) for g, want in zip(grads, wanted, strict=True) if want and g is not None]


def _zeros(k: Tensor | None, v: Tensor | None, lse: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (k, v) if x is not None)


def _segment_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    strength: float,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """A segment's share of dq; its dk and dv are added in place. Its weights are remade from the LSE of all."""
    grad_w, q_w, k_w, v_w = wide(grad), wide(q), wide(k), wide(v)
    shift = (grad_w * wide(out)).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift = shift - grad_lse[..., None]
    p = (q_w @ k_w.transpose(-1, -2)).mul_(scale).sub_(lse[..., None]).exp_().mul_(strength)
    dv += (p.transpose(-1, -2) @ grad_w).transpose(1, 2)
    ds = (grad_w @ v_w.transpose(-1, -2)).sub_(shift).mul_(p).mul_(scale)
    dk += (ds.transpose(-1, -2) @ q_w).transpose(1, 2)
    return (ds @ k_w).transpose(1, 2)


# --- cost ------------------------------------------------------------------------------------------------------------


def _cost(grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, *rest) -> tuple[int, int]:
    """FLOPs (five products per attended pair) and bytes (every operand and every gradient once)."""
    rows, fresh, reference = q.shape[1], *(0 if x is None else x.shape[1] for x in (k, ref_k))
    if num_frames > 1:
        frames = sum(min(f + radius + 1, num_frames) - max(f - radius, 0) for f in range(num_frames))
        pairs = frames * (rows // num_frames) ** 2 + rows * reference
    else:
        pairs = rows * (fresh + reference)
    moved = (grad, out, lse, q, q, *(k, v, ref_k, ref_v) * 2)
    total = sum(x.numel() * x.element_size() for x in moved if x is not None)
    return 10 * q.shape[0] * q.shape[2] * q.shape[3] * pairs, total


# --- implementations -------------------------------------------------------------------------------------------------


def _refuses_cpu(grad: Tensor, grad_lse: Tensor | None, q: Tensor, *rest) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(q.dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"D={q.shape[-1]} is above {MAX_HEAD_DIM}"
    return _load.native()[1] or None


def _refuses_reference(*args) -> str | None:
    return None


def run_native_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float,
    wanted: list[bool],
    isa: str | None = None,
    num_threads: int | None = None,
) -> list[Tensor]:
    """The C++ kernel; ``isa`` and ``num_threads`` (default: the best, torch's) are for tests and benchmarks."""
    grad, out, lse = (
        grad if grad.shape[-1] < 2 or grad.stride(-1) == 1 else grad.contiguous(),
        out.contiguous(),
        lse.contiguous(),
    )
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    inputs = (q, k, v, ref_k, ref_v)
    grads = [x.new_empty(x.shape) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True)]
    _load.module().attention_backward(
        _load.arg(grad),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *[_load.arg(x) for x in inputs],
        out.data_ptr(),
        lse.data_ptr(),
        [0 if x is None else x.data_ptr() for x in grads],
        scale,
        strength,
        num_frames,
        radius,
        num_threads or torch.get_num_threads(),
        isa,
    )
    return [x for x in grads if x is not None]


def _run_triton(*args) -> list[Tensor]:
    *call, wanted = args
    grads = _triton.attention_backward(*call)
    return [g.to(args[2].dtype) for g, want in zip(grads, wanted, strict=True) if want and g is not None]


_dispatch.register(
    "attention_backward",
    _cost,
    Implementation("triton", _triton.refuses_attention, _run_triton),
    Implementation("cpu", _refuses_cpu, run_native_backward),
    Implementation("reference", _refuses_reference, _definition),
)


@torch.library.custom_op(
    "avatar_rt::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_lse, Tensor q, Tensor? k, Tensor? v, Tensor? ref_k, Tensor? ref_v, Tensor out,"
    " Tensor lse, int num_frames, int radius, float scale, float strength, bool[] wanted) -> Tensor[]",
)
def _backward_op(grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale, strength, wanted):
    args = (grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale, strength, wanted)
    return _dispatch.run("attention_backward", *args)


@_backward_op.register_fake
def _fake(grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale, strength, wanted):
    inputs = (q, k, v, ref_k, ref_v)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
