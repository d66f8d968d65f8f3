"""The packed reference: keys and values laid out once per request as the attention kernel reads them, and reused."""

from typing import NamedTuple

import torch
from torch import Tensor

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import _check, _load

_LAYOUTS = ("rows", "pairs", "int8")


class PackedReference(NamedTuple):
    """What ``pack_reference`` returns: plain tensors, so that graphs, export and files see nothing new.

    Attributes:
        k: [B, N, R, D], contiguous, in the reference's dtype or int8.
        v: As ``k``; or, for a machine that multiplies bf16 in pairs of rows, [B, N, (R + 1) // 2, D, 2], where the
            second of an odd last pair is never looked at.
        k_scale, v_scale: [B, N, R] fp32 factors of int8 rows; empty otherwise.
        rows: R.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    rows: int


def pack_reference(ref_k: Tensor, ref_v: Tensor, *, storage: str | None = None) -> PackedReference:
    """Pack reference keys and values for ``sparse_reference_attention(..., packed=)`` on this machine.

    Args:
        ref_k, ref_v: [B, R, N, D], any floating dtype, D contiguous.
        storage: None keeps the dtype, and attention gives the very bits that it gives for the plain tensors; "int8"
            keeps int8 with an fp32 factor per row, each element off by at most max|row| / 254 (plus the rounding to
            the query's dtype): half the bytes of bf16, a quarter of fp32.

    Returns: PackedReference.
    Raises: InputError on a shape, dtype or storage above; UnsupportedError when a gradient is wanted.
    """
    sizes: dict[str, int] = {}
    for name, x in (("ref_k", ref_k), ("ref_v", ref_v)):
        _check.shape(name, x, "B R N D", sizes)
        _check.floating(name, x)
        _check.rows_contiguous(name, x)
    _check.same_dtype("ref_v", ref_v, "ref_k", ref_k)
    if storage not in (None, "int8"):
        raise InputError(f"storage: expected None or 'int8', got {storage!r}")
    refuse_gradients("pack_reference", ref_k=ref_k, ref_v=ref_v)
    layout = storage or layout_for(ref_k)
    k, v, k_scale, v_scale = torch.ops.avatar_rt.pack_reference(ref_k, ref_v, layout)
    return PackedReference(k, v, k_scale, v_scale, sizes["R"])


def layout_for(x: Tensor) -> str:
    """The layout that this machine's kernel reads without a copy for tensors like ``x``."""
    module, _ = _load.native()
    pairs = x.device.type == "cpu" and x.dtype == torch.bfloat16 and module and module.isas()[-1] == "avx512bf16"
    return "pairs" if pairs else "rows"


def layout_of(k: Tensor, v: Tensor) -> str:
    """The layout that packed tensors are in."""
    return "int8" if k.dtype == torch.int8 else "pairs" if v.dim() == 5 else "rows"


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """Raises: UnsupportedError when autograd would want a gradient of one of them."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"{op}: {name} requires a gradient, and a packed reference has none")


def check(packed: PackedReference, q: Tensor) -> None:
    """Raises: InputError unless ``packed`` fits the queries ``q`` [B, L, N, D]."""
    if not isinstance(packed, PackedReference):
        raise InputError(f"packed: expected a PackedReference, got {type(packed).__name__}")
    k, v, k_scale, v_scale, rows = packed
    (b, _, n, d), layout = q.shape, layout_of(k, v)
    same = [b, n, rows, d]
    shapes = {
        "k": (k, same),
        "v": (v, [b, n, (rows + 1) // 2, d, 2] if layout == "pairs" else same),
        "k_scale": (k_scale, [b, n, rows] if layout == "int8" else [0]),
        "v_scale": (v_scale, [b, n, rows] if layout == "int8" else [0]),
    }
    for name, (x, shape) in shapes.items():
        stored = torch.float32 if name.endswith("scale") else torch.int8 if layout == "int8" else q.dtype
        if list(x.shape) != shape:
            raise InputError(f"packed.{name}: expected shape {shape}, got {list(x.shape)}")
        if x.dtype != stored:
            raise InputError(f"packed.{name}: expected dtype {_word(stored)}, got {_word(x.dtype)}")
        if not x.is_contiguous():
            raise InputError(f"packed.{name}: expected a contiguous tensor, got strides {list(x.stride())}")
        _check.same_device(f"packed.{name}", x, "q", q)


def unpack(k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows that packed tensors stand for: keys and values [B, R, N, D] in ``dtype``."""
    layout = layout_of(k, v)
    if layout == "int8":
        k, v = ((x * scale[..., None]).to(dtype) for x, scale in ((k, k_scale), (v, v_scale)))
    if layout == "pairs":
        v = v.transpose(3, 4).flatten(2, 3)[:, :, : k.shape[2]]
    return k.transpose(1, 2), v.transpose(1, 2)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and fp32 factors; a row of zeros has factor 0, a row with a NaN or infinity a NaN factor."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / 127 if x.shape[-1] else wide.sum(-1, keepdim=True)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    steps = (wide / scale).nan_to_num(0.0).round()
    return steps.to(torch.int8), scale.squeeze(-1).float()


@torch.library.custom_op(
    "avatar_rt::pack_reference",
    mutates_args=(),
    schema="(Tensor ref_k, Tensor ref_v, str layout) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _pack_op(ref_k, ref_v, layout):
    k, v = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (ref_k, ref_v))
    if layout == "int8":
        (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
        return k, v, k_scale, v_scale
    if layout == "pairs":
        odd = v.shape[2] % 2
        v = torch.nn.functional.pad(v, (0, 0, 0, odd)).unflatten(2, (-1, 2)).transpose(3, 4).contiguous()
    return k, v, *(ref_k.new_empty(0, dtype=torch.float32) for _ in range(2))


@_pack_op.register_fake
def _(ref_k, ref_v, layout):
    if layout not in _LAYOUTS:
        raise InputError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    batch, rows, heads, dim = ref_k.shape
    dtype = torch.int8 if layout == "int8" else ref_k.dtype
    k = ref_k.new_empty((batch, heads, rows, dim), dtype=dtype)
    v = ref_k.new_empty((batch, heads, (rows + 1) // 2, dim, 2)) if layout == "pairs" else torch.empty_like(k)
    shape = (batch, heads, rows) if layout == "int8" else (0,)
    return k, v, *(ref_k.new_empty(shape, dtype=torch.float32) for _ in range(2))
