"""The CUDA kernels as implementations: when they refuse, and how they are launched on torch's stream."""

import functools

import torch
from torch import Tensor

from avatar_rt.ops import _load

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)


def refuses_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None, *rest
) -> str | None:
    """Why the CUDA kernel cannot run an attention op with these arguments, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"dtype {str(q.dtype).removeprefix('torch.')} is neither bfloat16 nor float16"
    if q.shape[-1] not in _HEAD_DIMS:
        return f"D={q.shape[-1]} is neither 64 nor 128"
    for name, x in (("q", q), ("k", k), ("v", v), ("ref_k", ref_k), ("ref_v", ref_v)):
        if x is not None and not _sixteen(x):
            return f"{name} does not lie at multiples of 16 bytes (strides {list(x.stride())})"
    return _device_refuses(q.device.index or 0)


@functools.cache
def _device_refuses(index: int) -> str | None:
    module, reason = _load.native()
    return reason if module is None else module.cuda_attention_refusal(index) or None


def _sixteen(x: Tensor) -> bool:
    """Whether every row that the kernel copies begins at a multiple of 16 bytes, and no two rows are one."""
    if x.numel() == 0:
        return True
    steps = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    return x.data_ptr() % 16 == 0 and all(s % 8 == 0 for _, s in steps) and (x.shape[1] == 1 or x.stride(1) > 0)


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream of q's device; out [B, L, N, D] and LSE [B, N, L] fp32."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    tensors = [_load.arg(x) for x in (q, k, v, ref_k, ref_v)]
    stream = torch.cuda.current_stream(q.device).cuda_stream
    with torch.cuda.device(q.device):
        _load.module().cuda_attention(
            *tensors, out.data_ptr(), lse.data_ptr(), scale, num_frames, radius, strength, stream
        )
    return out, lse


def sparse_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    scale: float,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``attention`` with the arguments of sparse_reference_attention: every query sees every row."""
    return attention(q, k, v, ref_k, ref_v, 1, 0, scale, strength)


def attention_emulated(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    ref_k: Tensor | None,
    ref_v: Tensor | None,
    num_frames: int,
    radius: int,
    scale: float,
    strength: float = 1.0,
    kernel: str = "sm90",
) -> tuple[Tensor, Tensor]:
    """The same kernel (``sm80`` or ``sm90``) in software, on CPU tensors: for tests on machines without a GPU."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    tensors = [_load.arg(x) for x in (q, k, v, ref_k, ref_v)]
    _load.module().cuda_attention_emulated(
        *tensors, out.data_ptr(), lse.data_ptr(), scale, num_frames, radius, strength, kernel
    )
    return out, lse
