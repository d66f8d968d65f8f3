"""Causal 3-D convolution whose past is an argument, so that a video can be cut into chunks anywhere."""

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import _check, _dispatch, _triton
from avatar_rt.ops._dispatch import Implementation


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> tuple[Tensor, Tensor]:
    """Convolve [state ; x]: no future frame is seen, height and width are padded with zeros by half the kernel.

    Args:
        x: [B, C, T, H, W] floating.
        weight: [O, C, kt, kh, kw] with kh and kw odd, dtype of ``x``. Under autocast all run in its dtype.
        bias: [O] or None.
        state: [B, C, kt-1, H, W], the frames before ``x``; None: zeros.
        stride: Steps in time, height, width.

    Returns: (y [B, O, T', H', W'], new_state [B, C, kt-1, H, W]); new_state is the end of [state ; x], the state
        of the next call. T' = (T - 1) // stride + 1, likewise H', W'.
    Raises: InputError on a shape or dtype above.
    """
    sizes: dict[str, int] = {}
    _check.shape("x", x, "B C T H W", sizes)
    _check.floating("x", x)
    _check.shape("weight", weight, "O C kt kh kw", sizes)
    if sizes["kh"] % 2 == 0 or sizes["kw"] % 2 == 0:
        raise InputError(f"weight: expected odd kh and kw, got {sizes['kh']} and {sizes['kw']}")
    if sizes["T"] < 1:
        raise InputError(f"x: expected at least one frame, got shape {list(x.shape)} for [B, C, T, H, W]")
    if bias is not None:
        _check.shape("bias", bias, "O", sizes)
    sizes["kt-1"] = sizes["kt"] - 1
    if state is not None:
        _check.shape("state", state, "B C kt-1 H W", sizes)
    if len(stride) != 3 or min(stride) < 1:
        raise InputError(f"stride: expected three numbers of 1 or more, got {stride}")
    dtype = _check.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias, state = (None if a is None else a.to(dtype) for a in (bias, state))
    for name, a in (("weight", weight), ("bias", bias), ("state", state)):
        if a is not None:
            _check.same_dtype(name, a, "x", x)
    return torch.ops.avatar_rt.causal_conv3d(x, weight, bias, state, list(stride))


def _with_past(x: Tensor, kt: int, state: Tensor | None) -> Tensor:
    """[state ; x] along time, zeros for a missing state."""
    if kt == 1:
        return x
    if state is None:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, kt - 1, 0))
    return torch.cat([state, x], 2)


def _padding(weight: Tensor) -> list[int]:
    return [0, weight.shape[3] // 2, weight.shape[4] // 2]


def _causal_conv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, stride: list[int]
) -> tuple[Tensor, Tensor]:
    kt = weight.shape[2]
    past = _with_past(x, kt, state)
    y = torch.nn.functional.conv3d(past, weight, bias, stride, _padding(weight))
    return y.contiguous(), past[:, :, past.shape[2] - (kt - 1) :].clone(memory_format=torch.contiguous_format)


def _causal_conv3d_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, stride: list[int]
) -> tuple[int, int]:
    """FLOPs (two per tap, channel and output) and bytes (inputs, weights and outputs once)."""
    y, new_state = _fake(x, weight, bias, state, stride)
    moved = sum(a.numel() * a.element_size() for a in (x, weight, bias, state, y, new_state) if a is not None)
    return 2 * y.numel() * weight[0].numel(), moved


def _refuses_reference(*args) -> str | None:
    return None  # torch's convolution (oneDNN) is the honest implementation on a CPU


_dispatch.register(
    "causal_conv3d",
    _causal_conv3d_cost,
    Implementation("triton", _triton.refuses_causal_conv3d, _triton.causal_conv3d),
    Implementation("reference", _refuses_reference, _causal_conv3d_ref),
)


@torch.library.custom_op(
    "avatar_rt::causal_conv3d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, int[] stride) -> (Tensor, Tensor)",
)
def _causal_conv3d_op(x, weight, bias, state, stride):
    return _dispatch.run("causal_conv3d", x, weight, bias, state, stride)


@_causal_conv3d_op.register_fake
def _fake(x, weight, bias, state, stride):
    batch, channels, *sizes = x.shape
    out = [(size - 1) // step + 1 for size, step in zip(sizes, stride, strict=True)]
    y = x.new_empty((batch, weight.shape[0], *out))
    return y, x.new_empty((batch, channels, weight.shape[2] - 1, *sizes[1:]))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    x, weight, bias, state, ctx.stride = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, state)


def _backward(ctx, grad: Tensor | None, grad_state: Tensor | None):
    x, weight, state = ctx.saved_tensors
    kt = weight.shape[2]
    need_past = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
    dpast = dweight = dbias = None
    with _check.plain(x):
        if grad is not None:
            mask = [need_past, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            past = _with_past(x, kt, state)
            dpast, dweight, dbias = torch.ops.aten.convolution_backward(
                grad, past, weight, [weight.shape[0]] if ctx.has_bias else None, ctx.stride, _padding(weight),
                [1, 1, 1], False, [0, 0, 0], 1, mask,
            )  # fmt: skip
        if grad_state is not None and need_past and kt > 1:
            frames = x.shape[2] + kt - 1
            if dpast is None:
                dpast = x.new_zeros((*x.shape[:2], frames, *x.shape[3:]))
            dpast[:, :, frames - (kt - 1) :] += grad_state
    dx = None if dpast is None else dpast[:, :, kt - 1 :]
    dstate = None if dpast is None or state is None else dpast[:, :, : kt - 1]
    return dx, dweight, dbias, dstate, None


_causal_conv3d_op.register_autograd(_backward, setup_context=_setup_context)
