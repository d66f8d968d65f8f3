"""The op under ``sparse_reference_attention(..., packed=)``: fresh rows plain, reference rows packed, no gradients."""

import torch
from torch import Tensor

from avatar_rt.ops import _cuda, _dispatch, _load, _triton, attention
from avatar_rt.ops._dispatch import Implementation
from avatar_rt.ops.packed import layout_of, unpack


def _packed_ref(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed_k: Tensor,
    packed_v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    rows: int,
    scale: float,
    strength: float,
) -> tuple[Tensor, Tensor]:
    ref_k, ref_v = unpack(packed_k, packed_v, k_scale, v_scale, q.dtype)
    return attention._sparse_ref(q, k, v, ref_k, ref_v, scale, strength)


def _packed_cost(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed_k: Tensor,
    packed_v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    rows: int,
    scale: float,
    strength: float,
) -> tuple[int, int]:
    """FLOPs as for plain reference rows; bytes of what is stored."""
    fresh = 0 if k is None else k.shape[1]
    lse_bytes = 4 * q.shape[0] * q.shape[1] * q.shape[2]
    moved = attention._bytes(q, k, v, packed_k, packed_v, k_scale, v_scale, q)
    return 4 * q.numel() * (fresh + rows), moved + lse_bytes


def _refuses_cpu(q: Tensor, k: Tensor | None, v: Tensor | None, packed_k: Tensor, packed_v: Tensor, *rest):
    reason = attention._refuses_cpu(q)
    if reason is None and layout_of(packed_k, packed_v) == "pairs":
        best = _load.module().isas()[-1]
        if best != "avx512bf16":
            return f"the reference is packed in pairs for avx512bf16, this machine has {best}: pack it here again"
    return reason


def run_native(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed_k: Tensor,
    packed_v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    rows: int,
    scale: float,
    strength: float = 1.0,
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; ``isa`` and ``num_threads`` as in ``attention.run_native``."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    tensors = [_load.arg(x) for x in (q, k, v, packed_k, packed_v, k_scale, v_scale)]
    threads = num_threads or torch.get_num_threads()
    _load.module().packed_attention(
        *tensors, rows, out.data_ptr(), lse.data_ptr(), scale, threads, isa, strength=strength
    )
    return out, lse


def _on_gpu(name: str, refuses, run) -> Implementation:
    """A GPU kernel on a reference packed as rows, which are a strided view of the plain one."""

    def refuses_packed(q, k, v, packed_k, packed_v, k_scale, v_scale, rows, scale, strength) -> str | None:
        layout = layout_of(packed_k, packed_v)
        if q.device.type == "cuda" and layout != "rows":
            return f"the reference is packed as {layout}, GPU kernels read rows"
        return refuses(
            q, k, v, *(unpack(packed_k, packed_v, k_scale, v_scale, q.dtype) if layout == "rows" else (None, None))
        )

    def run_packed(q, k, v, packed_k, packed_v, k_scale, v_scale, rows, scale, strength) -> tuple[Tensor, Tensor]:
        return run(q, k, v, *unpack(packed_k, packed_v, k_scale, v_scale, q.dtype), scale, strength)

    return Implementation(name, refuses_packed, run_packed)


_dispatch.register(
    "packed_reference_attention",
    _packed_cost,
    _on_gpu("cuda", _cuda.refuses_attention, _cuda.sparse_attention),
    _on_gpu("triton", _triton.refuses_attention, _triton.sparse_attention),
    Implementation("cpu", _refuses_cpu, run_native),
    Implementation("reference", lambda *args: None, _packed_ref, by_choice=False),
)


@torch.library.custom_op(
    "avatar_rt::packed_reference_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor? v, Tensor packed_k, Tensor packed_v, Tensor k_scale, Tensor v_scale,"
    " int rows, float scale, float strength) -> (Tensor, Tensor)",
)
def _packed_op(q, k, v, packed_k, packed_v, k_scale, v_scale, rows, scale, strength):
    args = (q, k, v, packed_k, packed_v, k_scale, v_scale, rows, scale, strength)
    return _dispatch.run("packed_reference_attention", *args)


@_packed_op.register_fake
def _(q, k, v, packed_k, packed_v, k_scale, v_scale, rows, scale, strength):
    return attention._fake(q, k, v, packed_k, packed_v)
