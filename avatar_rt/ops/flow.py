"""One step of the flow solver. Velocity is noise minus data: z_t = (1 - t) x + t noise."""

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import _check, _dispatch, _load, _triton
from avatar_rt.ops._dispatch import Implementation


def flow_step(z: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """Move a latent along its velocity from time ``t`` to ``t_next``: ``z + (t_next - t) * velocity``.

    Args:
        z: Any shape, floating.
        velocity: Shape of ``z``, any floating dtype.
        t, t_next: Times in 0..1; 1 is noise, 0 is data.

    Returns: Shape and dtype of ``z``; computed in fp32.
    Raises: InputError on a shape, dtype or time above.
    """
    if velocity.shape != z.shape:
        raise InputError(f"velocity: expected shape {list(z.shape)} like z, got {list(velocity.shape)}")
    _check.floating("z", z)
    _check.floating("velocity", velocity)
    _check.same_device("velocity", velocity, "z", z)
    for name, value in (("t", t), ("t_next", t_next)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name}: expected a time in 0..1, got {value}")
    return torch.ops.avatar_rt.flow_step(z, velocity, float(t), float(t_next))


def _flow_step_ref(z: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    return torch.add(z.to(wide), velocity.to(wide), alpha=t_next - t).to(z.dtype)


def _flow_step_cost(z: Tensor, velocity: Tensor, t: float, t_next: float) -> tuple[int, int]:
    """FLOPs and bytes: one multiply-add per element, two reads and one write."""
    return 2 * z.numel(), z.numel() * (2 * z.element_size() + velocity.element_size())


def _refuses_cuda(z: Tensor, velocity: Tensor, t: float, t_next: float) -> str | None:
    if z.device.type != "cuda":
        return f"z is on {z.device}"
    if z.dtype not in (torch.float32, torch.bfloat16) or velocity.dtype != z.dtype:
        return "z and velocity are not both float32 or both bfloat16"
    if not (z.is_contiguous() and velocity.is_contiguous()):
        return "z or velocity is not contiguous"
    module, reason = _load.native()
    if module is None:
        return reason
    return None if module.cuda else "avatar_rt._native was built without CUDA"


def _flow_step_cuda(z: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    out = torch.empty_like(z)
    stream = torch.cuda.current_stream(z.device).cuda_stream
    dtype = str(z.dtype).removeprefix("torch.")
    with torch.cuda.device(z.device):
        _load.module().flow_step_cuda(
            z.data_ptr(), velocity.data_ptr(), out.data_ptr(), z.numel(), t_next - t, dtype, stream
        )
    return out


def _refuses_reference(*args) -> str | None:
    return None  # one fused torch kernel is an honest implementation anywhere


_dispatch.register(
    "flow_step",
    _flow_step_cost,
    Implementation("cuda", _refuses_cuda, _flow_step_cuda),
    Implementation("triton", _triton.refuses_flow_step, _triton.flow_step),
    Implementation("reference", _refuses_reference, _flow_step_ref),
)


@torch.library.custom_op(
    "avatar_rt::flow_step", mutates_args=(), schema="(Tensor z, Tensor velocity, float t, float t_next) -> Tensor"
)
def _flow_step_op(z, velocity, t, t_next):
    return _dispatch.run("flow_step", z, velocity, t, t_next).contiguous()


@_flow_step_op.register_fake
def _(z, velocity, t, t_next):
    return z.new_empty(z.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, velocity, t, t_next = inputs
    ctx.dt, ctx.dtype = t_next - t, velocity.dtype


def _backward(ctx, grad: Tensor):
    return grad, (grad * ctx.dt).to(ctx.dtype), None, None


_flow_step_op.register_autograd(_backward, setup_context=_setup_context)
