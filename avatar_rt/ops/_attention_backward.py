"""Gradients of both attention ops, from the saved output and LSE, and the cutting into segments they share."""

import torch
from torch import Tensor

from avatar_rt.ops import _check, _triton

Segments = list[tuple[Tensor, Tensor]]


def segments_of(k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None) -> Segments:
    """The (key, value) pairs that hold rows, fresh before reference."""
    return [(a, b) for a, b in ((k, v), (ref_k, ref_v)) if a is not None and b is not None and a.shape[1] > 0]


def wide(x: Tensor) -> Tensor:
    """[B, L, N, D] -> [B, N, L, D] in the accumulation dtype: fp32, or fp64 for fp64."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def band(frame: int, num_frames: int, radius: int, rows: int) -> tuple[slice, slice]:
    """Rows of a frame, and the rows that they see, out of ``rows`` in ``num_frames`` frames."""
    size = rows // num_frames
    low, high = max(frame - radius, 0), min(frame + radius + 1, num_frames)
    return slice(frame * size, (frame + 1) * size), slice(low * size, high * size)


def setup_context(ctx, inputs, output) -> None:
    """Save what both ops' backward needs; ``inputs`` end in (scale,) or (num_frames, radius, scale)."""
    ctx.set_materialize_grads(False)
    tensors, ctx.band, ctx.scale = inputs[:5], inputs[5:-1], inputs[-1]
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients for (q, k, v, ref_k, ref_v) in the inputs' dtype, and None for each number."""
    q, k, v, ref_k, ref_v, out, lse = ctx.saved_tensors
    rest = (None,) * (len(ctx.band) + 1)
    if grad is None and grad_lse is None:
        return (None,) * 5 + rest
    if grad is None:
        grad = torch.zeros_like(out)
    with _check.plain(q):
        if _triton.refuses_attention(q) is None:
            num_frames, radius = ctx.band or (1, 0)
            grads = _triton.attention_backward(
                grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, ctx.scale
            )  # fmt: skip
        elif not ctx.band:
            dq, pairs = _attend_backward(grad, grad_lse, q, segments_of(k, v, ref_k, ref_v), out, lse, ctx.scale)
            grads = [dq, *_spread(pairs, k, ref_k)]
        else:
            num_frames, radius = ctx.band
            grads = _local_backward(grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, ctx.scale)
        return (*[None if g is None else g.to(q.dtype) for g in grads], *rest)


def _spread(pairs: Segments, *keys: Tensor | None) -> list[Tensor | None]:
    """Gradients per input again: those of an empty segment are empty, those of a missing one None."""
    rest = iter(pairs)
    grads: list[Tensor | None] = []
    for key in keys:
        if key is None:
            grads += (None, None)
        else:
            grads += next(rest) if key.shape[1] > 0 else (torch.zeros_like(key), torch.zeros_like(key))
    return grads


def _local_backward(grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale):
    dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    reference = [None if x is None else torch.zeros_like(x, dtype=lse.dtype) for x in (ref_k, ref_v)]
    parts = []
    for frame in range(num_frames):
        own, seen = band(frame, num_frames, radius, q.shape[1])
        own_lse = None if grad_lse is None else grad_lse[:, :, own]
        segments = segments_of(k[:, seen], v[:, seen], ref_k, ref_v)
        dq, pairs = _attend_backward(grad[:, own], own_lse, q[:, own], segments, out[:, own], lse[:, :, own], scale)
        parts.append(dq)
        totals = (dk[:, seen], dv[:, seen], *reference)
        for total, part in zip(totals, _spread(pairs, k, ref_k), strict=True):
            if total is not None and part is not None:
                total.add_(part)
    return [torch.cat(parts, 1), dk, dv, *reference]


def _attend_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, segments: Segments, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Segments]:
    """Gradients of ``_attend`` by the saved LSE: each segment's weights are remade alone, whatever the others hold."""
    grad_w, q_w, out_w = wide(grad), wide(q), wide(out)
    flash = grad_lse is None and q.device.type == "cpu" and q.shape[1] > 0
    shift = grad_w.new_zeros(()) if flash else (grad_w * out_w).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift = shift - grad_lse[..., None]
    dq, pairs = torch.zeros_like(q_w), []
    for k, v in segments:
        if flash:  # torch's fused kernel wants the total out and LSE, which is what makes a segment's share exact
            dq_part, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_w, q_w, wide(k), wide(v), out_w, lse, 0.0, False, scale=scale
            )
        else:
            k_w, v_w = wide(k), wide(v)
            p = (q_w @ k_w.transpose(-1, -2)).mul_(scale).sub_(lse[..., None]).exp_()
            dv = p.transpose(-1, -2) @ grad_w
            ds = (grad_w @ v_w.transpose(-1, -2)).sub_(shift).mul_(p).mul_(scale)
            dq_part, dk = ds @ k_w, ds.transpose(-1, -2) @ q_w
        dq += dq_part
        pairs.append((dk.transpose(1, 2), dv.transpose(1, 2)))
    return dq.transpose(1, 2), pairs
