"""Recorded kernel calls with fixed addresses, for a CPU: what a CUDA graph is to a GPU.

A program is recorded once over tensors that stay where they are, and run once a step; between its kernels nothing
happens. Rows are normalised in fp32, multiplied in bf16 and added up in fp32; what follows a product (bias, GELU, a
gated residual) is done before the sums leave the registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import _load
from avatar_rt.ops.packed import PackedReference

ROWS_MULTIPLE = 16  # channels that are normalised come in whole registers


class PackedLinear(NamedTuple):
    """Weights as the kernel reads them (bf16, in pairs of channels) and the bias [N] fp32; from ``pack_linear``."""

    weight: Tensor
    bias: Tensor
    taps: int
    channels: int
    outputs: int


class Table(NamedTuple):
    """Rows [T, C] fp32 that a kernel takes by index: int32 [rows], None for row 0 everywhere."""

    rows: Tensor
    of_row: Tensor | None = None


def refuses_program(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when programs run for weights of this device and dtype; else the reason."""
    if device.type != "cpu":
        return f"the weights are on {device}"
    if dtype != torch.bfloat16:
        return f"dtype {str(dtype).removeprefix('torch.')} is not bfloat16"
    module, reason = _load.native()
    if module is None:
        return reason
    best = module.isas()[-1]
    return None if best == "avx512bf16" else f"programs need avx512bf16, this machine has {best}"


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Packs weights [N, C], or [N, taps, C] of a convolution, any floating dtype, for a program.

    Raises: InputError on an odd C.
    """
    weight = weight[:, None] if weight.dim() == 2 else weight
    if weight.dim() != 3 or weight.shape[2] % 2:
        raise InputError(f"weight: expected [N, C] or [N, taps, C] with an even C, got {list(weight.shape)}")
    outputs, taps, channels = weight.shape
    plain = weight.detach().to(torch.bfloat16).contiguous()
    packed = torch.empty(_load.module().packed_linear_size(taps, channels, outputs), dtype=torch.bfloat16)
    _load.module().pack_linear(plain.data_ptr(), taps, channels, outputs, packed.data_ptr())
    given = torch.zeros(outputs) if bias is None else bias.detach().float().contiguous()
    return PackedLinear(packed, given, taps, channels, outputs)


def _grid(name: str, x: Tensor) -> tuple[list[int], int]:
    """Where rows lie: [R, C], or the pixels of [F, H, W, C]; channels contiguous. And how many they are."""
    if x.dim() not in (2, 4) or x.stride(-1) != 1:
        raise InputError(f"{name}: expected [R, C] or [F, H, W, C] with contiguous channels, got {list(x.shape)}")
    if x.dim() == 2:
        return [max(x.shape[0], 1), 1, x.stride(0), 0, 0], x.shape[0]
    f, h, w, _ = x.shape
    return [w, h, x.stride(2), x.stride(1), x.stride(0)], f * h * w


def _expect(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        raise InputError(f"{name}: expected dtype {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")


class Program:
    """Calls recorded in order over tensors that it keeps alive.

    Raises: UnsupportedError where ``refuses_program`` has a reason.
    """

    def __init__(self) -> None:
        reason = refuses_program(torch.device("cpu"), torch.bfloat16)
        if reason is not None:
            raise UnsupportedError(f"Program: {reason}")
        self._native = _load.module().Program()
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._native)

    def run(self, num_threads: int | None = None) -> None:
        """Runs all calls, on torch's number of threads unless told; the result does not depend on it."""
        self._native.run(num_threads or torch.get_num_threads())

    def _keep(self, *tensors: Tensor | None) -> None:
        self._kept += [x for x in tensors if x is not None]

    def _table(self, name: str, table: Table | None, rows: int, columns: int) -> tuple[int, int, int] | None:
        if table is None:
            return None
        x, index = table
        _expect(name, x, torch.float32)
        if x.dim() != 2 or x.shape[1] != columns or x.stride(1) != 1:
            raise InputError(f"{name}: expected [T, {columns}] with contiguous columns, got {list(x.shape)}")
        if index is not None:
            _expect(f"{name}'s index", index, torch.int32)
            if list(index.shape) != [rows] or not index.is_contiguous():
                raise InputError(f"{name}'s index: expected [{rows}], got {list(index.shape)}")
            if rows and not 0 <= int(index.min()) <= int(index.max()) < x.shape[0]:
                raise InputError(f"{name}'s index: expected values in 0..{x.shape[0] - 1}")
        self._keep(x, index)
        return x.data_ptr(), x.stride(0), 0 if index is None else index.data_ptr()

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        y: Tensor,
        *,
        finish: str = "store",
        taps: Sequence[int] = (0,),
        gate: Table | None = None,
        plus: Table | None = None,
    ) -> None:
        """Records ``y = x @ weight + bias`` and what follows.

        Args:
            x: [R, C] or [F, H, W, C] bf16; with taps, pixels whose taps stay inside of the memory of ``x``.
            y: [R, N] or [F, H, W, N], bf16 or fp32, as many rows.
            finish: ``store``, ``gelu`` (tanh form), or ``residual``: ``y += result * gate + plus``, y in fp32.
            taps: Offset in elements of each tap of the weights.
            gate, plus: [T, N] tables of ``residual``.
        """
        _expect("x", x, torch.bfloat16)
        _expect("y", y, torch.float32, *([] if finish == "residual" else [torch.bfloat16]))
        (source, rows), (target, into) = _grid("x", x), _grid("y", y)
        if (rows, x.shape[-1]) != (into, weight.channels) or y.shape[-1] != weight.outputs or len(taps) != weight.taps:
            raise InputError(
                f"linear: expected {weight.taps} taps and {weight.channels} -> {weight.outputs} channels, "
                f"got {len(taps)} and {list(x.shape)} -> {list(y.shape)}"
            )
        tables = [self._table(n, t, rows, weight.outputs) for n, t in (("gate", gate), ("plus", plus))]
        self._keep(x, y, weight.weight, weight.bias)
        self._native.linear(
            x.data_ptr(), source, rows, weight.channels, weight.outputs, list(taps), weight.weight.data_ptr(),
            weight.bias.data_ptr(), finish, y.data_ptr(), y.dtype == torch.float32, target, *tables,
        )  # fmt: skip

    def norm(
        self,
        kind: str,
        x: Tensor,
        y: Tensor,
        *,
        eps: float = 0.0,
        scale: Table | None = None,
        shift: Table | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        silu: bool = False,
    ) -> None:
        """Records ``y = normalise(x) * scale + shift``, turned by ``rope``, through SiLU.

        Args:
            kind: ``layer``, ``rms``, ``length`` (RMS without eps, as ``channel_norm``) or ``none``.
            x: [R, C] or [F, H, W, C], bf16 or fp32, C a multiple of 16.
            y: The same shape in bf16; it may be ``x``.
            scale, shift: [T, C] tables.
            rope: cos and sin [period, D] fp32 from ``rope_lanes``; row i takes row i % period; C a multiple of D.
        """
        _expect("x", x, torch.float32, torch.bfloat16)
        _expect("y", y, torch.bfloat16)
        (source, rows), (target, into) = _grid("x", x), _grid("y", y)
        channels = x.shape[-1]
        if rows != into or y.shape[-1] != channels or channels % ROWS_MULTIPLE:
            raise InputError(f"norm: expected C in multiples of 16 and one shape, got {x.shape} -> {y.shape}")
        cos, sin = rope or (None, None)
        if cos is not None and (channels % cos.shape[1] or cos.shape[1] % ROWS_MULTIPLE):
            raise InputError(f"rope: expected D a multiple of 16 and a divisor of {channels}, got {cos.shape[1]}")
        tables = [self._table(n, t, rows, channels) for n, t in (("scale", scale), ("shift", shift))]
        self._keep(x, y, cos, sin)
        self._native.norm(
            kind, x.data_ptr(), x.dtype == torch.float32, source, rows, channels, eps, *tables,
            0 if cos is None else cos.data_ptr(), 0 if sin is None else sin.data_ptr(),
            1 if cos is None else cos.shape[0], 16 if cos is None else cos.shape[1], silu, y.data_ptr(), target,
        )  # fmt: skip

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        *,
        reference: tuple[Tensor, Tensor] | PackedReference | None = None,
        strength: float = 1.0,
    ) -> None:
        """Records ``sparse_reference_attention``: q, k, v [B, L, N, D] bf16; out like q, contiguous."""
        if out.shape != q.shape or not out.is_contiguous() or out.dtype != q.dtype:
            raise InputError(f"out: expected a contiguous {list(q.shape)} {q.dtype}, got {list(out.shape)} {out.dtype}")
        fresh = [_load.arg(x) for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5
        self._keep(q, k, v, out)
        if isinstance(reference, PackedReference):
            *tensors, rows = reference
            self._keep(*tensors)
            packed = [_load.arg(x) for x in tensors]
            self._native.packed_attention(*fresh, *packed, rows, out.data_ptr(), scale, strength)
            return
        ref_k, ref_v = reference or (None, None)
        self._keep(ref_k, ref_v)
        self._native.attention(*fresh, _load.arg(ref_k), _load.arg(ref_v), out.data_ptr(), scale, strength)


def rope_lanes(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [L, D/2] fp32 as ``Program.norm`` reads them, [L, D]: each cosine twice, each sine as -s, s."""
    both = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
    return both[0].flatten(-2).contiguous(), both[1].flatten(-2).contiguous()
