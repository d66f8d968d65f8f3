"""The packed reference: the very bits of the plain one, int8 within its bound, refusals."""

from __future__ import annotations

import pytest
import torch
from test_attention import ISAS, inputs, make
from tolerance import doubled
from torch import Tensor
from torch.library import opcheck

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import (
    PackedReference,
    _load,
    _packed_attention,
    cost,
    explain,
    force,
    pack_reference,
    sparse_reference_attention,
)
from avatar_rt.ops.attention import _sparse_ref, run_native
from avatar_rt.ops.packed import layout_for, unpack

OP = "packed_reference_attention"
DTYPES = [torch.float32, torch.bfloat16]
# (batch, queries, fresh rows, reference rows, heads, head dim)
SHAPES = [
    (1, 1, None, 1, 1, 1),
    (2, 70, 97, 5, 3, 64),
    (1, 65, 3, 191, 2, 33),
    (1, 5, None, 96, 2, 128),
    (1, 17, 192, 101, 2, 80),
    (1, 19, 7, 0, 1, 256),
    (1, 300, 420, 701, 2, 64),
]


def pack_for(ref_k: Tensor, ref_v: Tensor, isa: str) -> PackedReference:
    """As ``pack_reference`` would on a machine whose best instruction set is ``isa``."""
    layout = "pairs" if isa == "avx512bf16" and ref_k.dtype == torch.bfloat16 else "rows"
    return PackedReference(*torch.ops.avatar_rt.pack_reference(ref_k, ref_v, layout), ref_k.shape[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_bit_equal_to_plain(shape, dtype, isa):
    """Any strides, ragged lengths, NaN around the plain rows, any number of threads, any strength."""
    q, k, v, ref_k, ref_v = inputs(shape, dtype)
    packed = pack_for(ref_k, ref_v, isa)
    for strength, threads in ((1.0, 1), (1.0, 3), (0.5, 1)):
        want = run_native(q, k, v, ref_k, ref_v, 1, 0, 0.2, strength, isa=isa)
        got = _packed_attention.run_native(q, k, v, *packed, 0.2, strength, isa=isa, num_threads=threads)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not want[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_takes_a_packed_reference(dtype):
    q, k, v, ref_k, ref_v = inputs((2, 30, 20, 51, 2, 64), dtype)
    packed = pack_reference(ref_k, ref_v)
    assert isinstance(packed, PackedReference) and packed.rows == 51
    for strength in (0.0, 0.5, 1.0, 2.0):
        want = sparse_reference_attention(q, k, v, ref_k, ref_v, strength=strength, return_lse=True)
        got = sparse_reference_attention(q, k, v, packed=packed, strength=strength, return_lse=True)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    alone = sparse_reference_attention(q, None, None, ref_k, ref_v)
    assert torch.equal(sparse_reference_attention(q, None, None, packed=packed), alone)
    for x, y in zip(unpack(*packed[:4], dtype), (ref_k, ref_v), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_definition_is_unpack_then_the_plain_definition(dtype):
    q, k, v, ref_k, ref_v = inputs((2, 30, 20, 51, 2, 16), dtype)
    with force("sparse_reference_attention", "reference"), force(OP, "reference"):
        want = sparse_reference_attention(q, k, v, ref_k, ref_v, strength=0.5, return_lse=True)
        packed = pack_reference(ref_k, ref_v)
        got = sparse_reference_attention(q, k, v, packed=packed, strength=0.5, return_lse=True)
    torch.testing.assert_close(got, want)  # other strides, so torch may sum in another order


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_packed_rows_leaks(dtype, storage):
    """NaN before and after every packed tensor in memory, and in the half of a last pair that holds no row."""
    q, k, v, ref_k, ref_v = inputs((1, 70, 4, 147, 2, 64), dtype)
    packed = pack_reference(ref_k, ref_v, storage=storage)
    want = sparse_reference_attention(q, k, v, packed=packed)
    poisoned = []
    for x in packed[:4]:
        buffer = torch.full((x.numel() + 512,), float("nan")).to(x.dtype)
        buffer[256:-256] = x.flatten()
        poisoned.append(buffer[256:-256].view(x.shape))
    if poisoned[1].dim() == 5:
        poisoned[1][:, :, -1, :, 1] = float("nan")
    assert torch.equal(sparse_reference_attention(q, k, v, packed=PackedReference(*poisoned, 147)), want)


# --- int8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_within_their_bound(dtype):
    x, y = make(2, 33, 3, 64, dtype), make(2, 33, 3, 64, dtype)
    y[:, 5] = 0
    packed = pack_reference(x, y, storage="int8")
    for got, want in zip(unpack(*packed[:4], torch.float64), (x, y), strict=True):
        bound = want.double().abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)
        assert ((got - want.double()).abs() <= bound).all()
    stored = sum(t.numel() * t.element_size() for t in packed[:4])
    assert stored <= (1 + 4 / 64) * 2 * 33 * 3 * 64 * 2  # a byte per element and a factor per row


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 70, 97, 5, 3, 64), (1, 40, 20, 701, 2, 128), (1, 65, None, 191, 2, 33)])
def test_int8_kernel_is_its_definition(shape, dtype, isa):
    """Against fp64 attention over the unpacked rows, so that only the kernel's own arithmetic is measured."""
    q, k, v, ref_k, ref_v = inputs(shape, dtype)
    packed = pack_reference(ref_k, ref_v, storage="int8")
    plain_rows = unpack(*packed[:4], dtype)
    want = run_native(q, k, v, *plain_rows, 1, 0, 0.125, 0.7, isa=isa)
    for threads in (1, 3):
        got = _packed_attention.run_native(q, k, v, *packed, 0.125, 0.7, isa=isa, num_threads=threads)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_int8_error_against_fp64(dim, dtype):
    """Normal rows, 4000 of them: relative RMS error within 1.2 %, cosine above 0.9999, LSE within 0.01.

    A row's step is max|row| / 127, about 2.5 to 2.8 sigma / 127; uniform error within it is 0.6 % of sigma in each of
    keys and values, and a score of standard deviation 1 passes its own 0.6 % on to its weight.
    """
    q, k, v, ref_k, ref_v = inputs((1, 64, 100, 4000, 2, dim), dtype)
    truth, truth_lse = _sparse_ref(*doubled(q, k, v, ref_k, ref_v), dim**-0.5)
    packed = pack_reference(ref_k, ref_v, storage="int8")
    out, lse = sparse_reference_attention(q, k, v, packed=packed, return_lse=True)
    error = (out.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    cosine = torch.nn.functional.cosine_similarity(out.double().flatten(), truth.flatten(), 0)
    assert error < 0.012, f"relative RMS error {error:.4f}"
    assert cosine > 0.9999, f"cosine {cosine:.6f}"
    assert (lse.double() - truth_lse).abs().max() < 0.01


def test_int8_keeps_a_broken_row_broken():
    q, k, v, ref_k, ref_v = inputs((1, 3, 4, 7, 1, 8))
    ref_v[0, 2, 0, 3] = float("inf")
    out = sparse_reference_attention(q, k, v, packed=pack_reference(ref_k, ref_v, storage="int8"))
    assert out.isnan().all()


# --- contracts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    q, k, v, ref_k, ref_v = inputs((2, 6, 6, 3, 2, 4), dtype)
    for layout in ("rows", "pairs", "int8") if dtype == torch.bfloat16 else ("rows", "int8"):
        opcheck(torch.ops.avatar_rt.pack_reference, (ref_k, ref_v, layout))
    for storage in (None, "int8"):
        packed = pack_reference(ref_k, ref_v, storage=storage)
        opcheck(torch.ops.avatar_rt.packed_reference_attention, (q, k, v, *packed, 0.5, 2.0))
        opcheck(torch.ops.avatar_rt.packed_reference_attention, (q, None, None, *packed, 0.5, 1.0))


def test_cost_counts_stored_bytes():
    q, k, v, ref_k, ref_v = inputs((2, 12, 12, 5, 3, 8))
    plain = cost("sparse_reference_attention", q, k, v, ref_k, ref_v, 1.0, 1.0)
    assert cost(OP, q, k, v, *pack_reference(ref_k, ref_v), 1.0, 1.0) == plain
    flops, moved = cost(OP, q, k, v, *pack_reference(ref_k, ref_v, storage="int8"), 1.0, 1.0)
    rows = 2 * 3 * 5
    assert (flops, moved) == (plain[0], plain[1] - 2 * rows * 8 * 4 + 2 * rows * (8 + 4))


def test_pairs_of_another_machine_are_refused(monkeypatch):
    q, k, v, ref_k, ref_v = inputs((1, 6, 6, 3, 2, 8), torch.bfloat16)
    packed = pack_for(ref_k, ref_v, "avx512bf16")
    native = _load.module()

    class Older:
        isas = staticmethod(lambda: ["scalar", "avx2"])
        packed_attention = native.packed_attention
        Tensor = native.Tensor

    monkeypatch.setattr(_load, "native", lambda: (Older, ""))
    assert layout_for(ref_k) == "rows"
    with pytest.raises(
        UnsupportedError, match="cpu: the reference is packed in pairs for avx512bf16, this machine has"
    ):
        sparse_reference_attention(q, k, v, packed=packed)
    assert explain(OP, q, k, v, *pack_reference(ref_k, ref_v), 1.0, 1.0)["cpu"] is None


def test_gradients_are_refused():
    q, k, v, ref_k, ref_v = inputs((1, 6, 6, 3, 2, 8))
    packed = pack_reference(ref_k, ref_v)
    with pytest.raises(UnsupportedError, match="q requires a gradient, and a packed reference has none"):
        sparse_reference_attention(q.clone().requires_grad_(), k, v, packed=packed)
    with pytest.raises(UnsupportedError, match="pack_reference: ref_v requires a gradient"):
        pack_reference(ref_k, ref_v.clone().requires_grad_())
    with torch.no_grad():
        sparse_reference_attention(q.clone().requires_grad_(), k, v, packed=packed)


def row(rows=4, heads=2, dim=8, dtype=torch.float32):
    return torch.zeros(1, rows, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: pack_reference(row()[0], row()), "ref_k: expected 4 dimensions [B, R, N, D], got shape"),
        (lambda p: pack_reference(row(), row(5)), "ref_v: expected R=4, got 5"),
        (lambda p: pack_reference(row(), row(dtype=torch.bfloat16)), "ref_v: expected dtype float32 like ref_k"),
        (lambda p: pack_reference(row(), row(), storage="fp4"), "storage: expected None or 'int8', got 'fp4'"),
        (
            lambda p: sparse_reference_attention(row(), row(), row(), row(), row(), packed=p),
            "packed: expected None beside ref_k and ref_v, got a PackedReference",
        ),
        (
            lambda p: sparse_reference_attention(row(), row(), row(), packed=tuple(p)),
            "packed: expected a PackedReference, got tuple",
        ),
        (
            lambda p: sparse_reference_attention(row(heads=3), None, None, packed=p),
            "packed.k: expected shape [1, 3, 4, 8], got [1, 2, 4, 8]",
        ),
        (
            lambda p: sparse_reference_attention(row(dtype=torch.float64), None, None, packed=p),
            "packed.k: expected dtype float64, got float32",
        ),
        (
            lambda p: sparse_reference_attention(row(), None, None, packed=p._replace(rows=5)),
            "packed.k: expected shape [1, 2, 5, 8], got [1, 2, 4, 8]",
        ),
        (
            lambda p: sparse_reference_attention(row(), None, None, packed=p, strength=0.0),
            "k: expected at least one fresh row at strength 0, got none",
        ),
    ],
)
def test_input_errors(call, sentence):
    with pytest.raises(InputError) as caught:
        call(pack_reference(row(), row()))
    assert sentence in str(caught.value)
