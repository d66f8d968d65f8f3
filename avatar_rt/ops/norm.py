"""The memory-bound pieces around attention: QK RMSNorm with rotation, AdaLN modulation, gated residual."""

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import _check, _dispatch, _triton
from avatar_rt.ops._dispatch import Implementation


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMSNorm each token over all heads together, scale by ``weight``, then rotate channel pairs (2i, 2i+1).

    Args:
        x: [B, L, N, D] fp32 or bf16, D even.
        weight: [N*D], any floating dtype.
        cos, sin: [L, D/2] fp32 (fp64 for fp64 inputs), the angle of each pair at each token.
        eps: Added to the mean square.

    Returns: [B, L, N, D], dtype of ``x``; normalised and rotated in fp32.
    Raises: InputError on a shape or dtype above.
    """
    sizes: dict[str, int] = {}
    _check.shape("x", x, "B L N D", sizes)
    _check.floating("x", x)
    if sizes["D"] % 2:
        raise InputError(f"x: expected an even D, got {sizes['D']} (shape {list(x.shape)} for [B, L, N, D])")
    sizes["N*D"], sizes["D/2"] = sizes["N"] * sizes["D"], sizes["D"] // 2
    _check.shape("weight", weight, "N*D", sizes)
    _check.floating("weight", weight)
    for name, table in (("cos", cos), ("sin", sin)):
        _check.shape(name, table, "L D/2", sizes)
        _check.floating(name, table)
        _check.same_device(name, table, "x", x)
    _check.same_device("weight", weight, "x", x)
    _check.positive("eps", eps)
    return torch.ops.avatar_rt.qk_norm_rope(x, weight, cos, sin, eps)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """LayerNorm each token without affine, then apply its frame's AdaLN: ``norm(x) * (1 + scale) + shift``.

    Args:
        x: [B, L, C] fp32 or bf16.
        shift, scale: [B, T, C], any floating dtype; row t holds frame t.
        index: [L] int64 in 0..T-1, the frame of each token; None: token i belongs to frame i // (L / T).
        eps: Added to the variance.

    Returns: [B, L, C], dtype of ``x``; computed in fp32.
    Raises: InputError on a shape or dtype above.
    """
    sizes: dict[str, int] = {}
    _check.shape("x", x, "B L C", sizes)
    _check.floating("x", x)
    for name, row in (("shift", shift), ("scale", scale)):
        _check_rows(name, row, x, sizes)
    _check_index(index, x, sizes)
    _check.positive("eps", eps)
    return torch.ops.avatar_rt.layernorm_modulate(x, shift, scale, index, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """Add a branch to the residual stream through its frame's gate: ``x + y * gate``.

    Args:
        x, y: [B, L, C], any floating dtypes.
        gate: [B, T, C], any floating dtype.
        index: As in ``layernorm_modulate``.

    Returns: [B, L, C], dtype of ``x``; computed in fp32.
    Raises: InputError on a shape or dtype above.
    """
    sizes: dict[str, int] = {}
    _check.shape("x", x, "B L C", sizes)
    _check.shape("y", y, "B L C", sizes)
    _check.floating("x", x)
    _check.floating("y", y)
    _check.same_device("y", y, "x", x)
    _check_rows("gate", gate, x, sizes)
    _check_index(index, x, sizes)
    return torch.ops.avatar_rt.gate_residual(x, y, gate, index)


def _check_rows(name: str, rows: Tensor, x: Tensor, sizes: dict[str, int]) -> None:
    _check.shape(name, rows, "B T C", sizes)
    _check.floating(name, rows)
    _check.same_device(name, rows, "x", x)


def _check_index(index: Tensor | None, x: Tensor, sizes: dict[str, int]) -> None:
    if index is None:
        if sizes["T"] < 1 or sizes["L"] % sizes["T"]:
            raise InputError(f"x: expected L a multiple of T={sizes['T']} when index is None, got L={sizes['L']}")
        return
    _check.shape("index", index, "L", sizes)
    _check.same_device("index", index, "x", x)
    if index.dtype != torch.int64:
        raise InputError(f"index: expected dtype int64, got {str(index.dtype).removeprefix('torch.')}")


# --- definitions -----------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of a contiguous [B, L, N, D] in fp32 or fp64: a complex product per pair."""
    turn = torch.complex(cos.to(x.dtype), sin.to(x.dtype))[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _qk_norm_rope_ref(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    wide = _wide(x).flatten(2)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return _rotate(normed.view(x.shape), cos, sin).to(x.dtype)


def _per_token(rows: Tensor, index: Tensor | None, x: Tensor) -> Tensor:
    """[B, T, C] -> something that broadcasts against ``_framed(x)``, in the dtype of ``x``."""
    rows = rows.to(x.dtype)
    return rows[:, :, None] if index is None else rows[:, index]


def _framed(x: Tensor, num_frames: int, index: Tensor | None) -> Tensor:
    return x if index is not None else x.reshape(x.shape[0], num_frames, x.shape[1] // num_frames, x.shape[2])


def _layernorm_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    normed = torch.nn.functional.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    framed = _framed(normed, shift.shape[1], index)
    out = torch.addcmul(_per_token(shift, index, normed), framed, 1 + _per_token(scale, index, normed))
    return out.reshape(x.shape).to(x.dtype)


def _gate_residual_ref(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    wide = _framed(_wide(x), gate.shape[1], index)
    branch = _framed(y.to(wide.dtype), gate.shape[1], index)
    return torch.addcmul(wide, branch, _per_token(gate, index, wide)).reshape(x.shape).to(x.dtype)


# --- gradients -------------------------------------------------------------------------------------------------------


def _to_frames(x: Tensor, rows: Tensor, index: Tensor | None) -> Tensor:
    """Sum [B, L, C] over the tokens of each frame, in the dtype and shape [B, T, C] of ``rows``."""
    if index is None:
        return _framed(x, rows.shape[1], None).sum(2).to(rows.dtype)
    return x.new_zeros(rows.shape).index_add_(1, index, x).to(rows.dtype)


def _qk_norm_rope_backward(ctx, grad: Tensor):
    x, weight, cos, sin = ctx.saved_tensors
    with _check.plain(x):
        wide = _wide(x).flatten(2)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        back = _rotate(_wide(grad).contiguous(), cos, -sin).flatten(2)
        normed = wide * r
        dweight = (back * normed).sum((0, 1)).to(weight.dtype)
        scaled = back * weight.to(wide.dtype)
        dx = r * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx.view(x.shape).to(x.dtype), dweight, None, None, None


def _layernorm_modulate_backward(ctx, grad: Tensor):
    x, shift, scale, index = ctx.saved_tensors
    with _check.plain(x):
        wide, grad = _wide(x), _wide(grad)
        normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, ctx.eps)
        gain = 1 + _per_token(scale, index, wide)
        inner = (_framed(grad, shift.shape[1], index) * gain).reshape(x.shape)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            inner, wide, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return dx.to(x.dtype), _to_frames(grad, shift, index), _to_frames(grad * normed, scale, index), None, None


def _gate_residual_backward(ctx, grad: Tensor):
    y, gate, index = ctx.saved_tensors
    with _check.plain(y):
        wide = _wide(grad)
        dy = (_framed(wide, gate.shape[1], index) * _per_token(gate, index, wide)).reshape(y.shape).to(y.dtype)
        return grad, dy, _to_frames(wide * y, gate, index), None


# --- cost: FLOPs and bytes -------------------------------------------------------------------------------------------


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _qk_norm_rope_cost(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[int, int]:
    return 7 * x.numel(), _bytes(x, x, weight, cos, sin)


def _layernorm_modulate_cost(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float
) -> tuple[int, int]:
    return 7 * x.numel(), _bytes(x, x, shift, scale, index)


def _gate_residual_cost(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> tuple[int, int]:
    return 2 * x.numel(), _bytes(x, x, y, gate, index)


# --- implementations -------------------------------------------------------------------------------------------------


def _refuses_reference(*args) -> str | None:
    return None  # torch's own elementwise kernels are the honest implementation on a CPU


_dispatch.register(
    "qk_norm_rope",
    _qk_norm_rope_cost,
    Implementation("triton", _triton.refuses_qk_norm_rope, _triton.qk_norm_rope),
    Implementation("reference", _refuses_reference, _qk_norm_rope_ref),
)
_dispatch.register(
    "layernorm_modulate",
    _layernorm_modulate_cost,
    Implementation("triton", _triton.refuses_layernorm_modulate, _triton.layernorm_modulate),
    Implementation("reference", _refuses_reference, _layernorm_modulate_ref),
)
_dispatch.register(
    "gate_residual",
    _gate_residual_cost,
    Implementation("triton", _triton.refuses_gate_residual, _triton.gate_residual),
    Implementation("reference", _refuses_reference, _gate_residual_ref),
)


@torch.library.custom_op(
    "avatar_rt::qk_norm_rope",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _qk_norm_rope_op(x, weight, cos, sin, eps):
    return _dispatch.run("qk_norm_rope", x, weight, cos, sin, eps)


@torch.library.custom_op(
    "avatar_rt::layernorm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor shift, Tensor scale, Tensor? index, float eps) -> Tensor",
)
def _layernorm_modulate_op(x, shift, scale, index, eps):
    return _dispatch.run("layernorm_modulate", x, shift, scale, index, eps)


@torch.library.custom_op(
    "avatar_rt::gate_residual", mutates_args=(), schema="(Tensor x, Tensor y, Tensor gate, Tensor? index) -> Tensor"
)
def _gate_residual_op(x, y, gate, index):
    return _dispatch.run("gate_residual", x, y, gate, index)


def _fake(x, *rest):
    return x.new_empty(x.shape)


def _save_with_eps(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _save_branch(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


_qk_norm_rope_op.register_autograd(_qk_norm_rope_backward, setup_context=_save_with_eps)
_layernorm_modulate_op.register_autograd(_layernorm_modulate_backward, setup_context=_save_with_eps)
_gate_residual_op.register_autograd(_gate_residual_backward, setup_context=_save_branch)
for _op in (_qk_norm_rope_op, _layernorm_modulate_op, _gate_residual_op):
    _op.register_fake(_fake)
