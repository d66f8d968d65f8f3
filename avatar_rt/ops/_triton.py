"""What ops ask before they hand a call to ``avatar_rt.kernels``, and the hand-over; Triton is imported only there."""

import functools
import importlib.util
import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
_MIN_ARCH = (8, 0)
attention_tiles: tuple[int, ...] = ()  # rows, keys, warps, stages; set by ops.schedule, empty is the table
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _arch(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refuses(name: str, x: Tensor, *others: Tensor | None) -> str | None:
    """None when the kernels take a tensor of this device and the dtypes given; else the reason."""
    if x.device.type != "cuda":
        return f"{name} is on {x.device}"
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} is none of float32, bfloat16, float16"
    if not _installed():
        return "triton is not installed"
    arch = _arch(x.device)
    if arch < _MIN_ARCH:
        return f"compute capability {arch[0]}.{arch[1]} is below {_MIN_ARCH[0]}.{_MIN_ARCH[1]}"
    return None


def refuses_rows(**tensors: Tensor | None) -> str | None:
    """None when each tensor's last dimension is contiguous; else the reason."""
    for key, x in tensors.items():
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{key} is not contiguous in its last dimension (strides {list(x.stride())})"
    return None


# --- attention -------------------------------------------------------------------------------------------------------


def refuses_attention(q: Tensor, *rest) -> str | None:
    """For both attention ops, whose tensors share a dtype and have contiguous rows."""
    if q.device.type == "cuda" and q.shape[-1] > MAX_HEAD_DIM:
        return f"D={q.shape[-1]} is above {MAX_HEAD_DIM}"
    return refuses("q", q)


def _bias(strength: float) -> float:
    return math.log2(strength) if strength > 0 else -math.inf


def local_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None,
    num_frames: int, radius: int, scale: float, strength: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs ``local_temporal_attention``."""
    from avatar_rt.kernels.attention import Config, attention

    config = Config(*attention_tiles) if attention_tiles else None
    return attention(q, k, v, ref_k, ref_v, num_frames, radius, scale, _bias(strength), config)


def sparse_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None, ref_v: Tensor | None,
    scale: float, strength: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs ``sparse_reference_attention``."""
    return local_attention(q, k, v, ref_k, ref_v, 1, 0, scale, strength)


def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, ref_k: Tensor | None,
    ref_v: Tensor | None, out: Tensor, lse: Tensor, num_frames: int, radius: int, scale: float, strength: float = 1.0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of both attention ops for (q, k, v, ref_k, ref_v)."""
    from avatar_rt.kernels import attention_backward as kernels

    bias = _bias(strength)
    return kernels.attention_backward(
        grad, grad_lse, q, k, v, ref_k, ref_v, out, lse, num_frames, radius, scale, bias
    )  # fmt: skip


# --- norm ------------------------------------------------------------------------------------------------------------


def refuses_qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> str | None:
    return refuses("x", x, weight, cos, sin) or refuses_rows(x=x, weight=weight, cos=cos, sin=sin)


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    from avatar_rt.kernels import norm

    return norm.qk_norm_rope(x, weight, cos, sin, eps)


def refuses_layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> str | None:
    return refuses("x", x, shift, scale) or refuses_rows(x=x, shift=shift, scale=scale, index=index)


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    from avatar_rt.kernels import norm

    return norm.layernorm_modulate(x, shift, scale, index, eps)


def refuses_gate_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> str | None:
    return refuses("x", x, y, gate) or refuses_rows(x=x, y=y, gate=gate, index=index)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    from avatar_rt.kernels import norm

    return norm.gate_residual(x, y, gate, index)


# --- conv, flow ------------------------------------------------------------------------------------------------------


def refuses_causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, stride: list[int]
) -> str | None:
    if weight.shape[2] == 1 and x.device.type == "cuda":
        return "kt=1 has no past to carry"
    for name, tensor in (("x", x), ("state", state)):
        if tensor is not None and x.device.type == "cuda" and tensor.stride()[3:] != (tensor.shape[4], 1):
            return f"{name} is not contiguous in height and width (strides {list(tensor.stride())})"
    return refuses("x", x)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, stride: list[int]
) -> tuple[Tensor, Tensor]:
    """The past in one kernel, the convolution itself by cuDNN."""
    from avatar_rt.kernels.conv import with_past

    past, new_state = with_past(x, state, weight.shape[2])
    padding = [0, weight.shape[3] // 2, weight.shape[4] // 2]
    return torch.nn.functional.conv3d(past, weight, bias, stride, padding).contiguous(), new_state


def refuses_flow_step(z: Tensor, velocity: Tensor, t: float, t_next: float) -> str | None:
    if z.device.type == "cuda" and not (z.is_contiguous() and velocity.is_contiguous()):
        return "z or velocity is not contiguous"
    return refuses("z", z, velocity)


def flow_step(z: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    from avatar_rt.kernels.flow import flow_step as step

    return step(z, velocity, t_next - t)
