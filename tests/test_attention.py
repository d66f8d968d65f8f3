"""Both attention ops: the definition against dense masked attention, the CPU kernel against the definition."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_accurate, doubled
from torch import Tensor
from torch.library import opcheck

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import _dispatch, _load, cost, explain, force, local_temporal_attention, sparse_reference_attention
from avatar_rt.ops.attention import _local_ref, _sparse_ref, run_native

OPS = ("sparse_reference_attention", "local_temporal_attention")
NATIVE = _load.native()[0]
ISAS = NATIVE.isas() if NATIVE else []

# (batch, queries, fresh rows, reference rows, heads, head dim): smallest, ragged, large; None: no such segment.
SHAPES = [
    (1, 1, 1, None, 1, 1),
    (1, 1, None, 1, 1, 2),
    (2, 70, 97, 5, 3, 64),
    (1, 65, 3, 191, 2, 33),
    (1, 5, None, 96, 2, 128),
    (1, 17, 192, None, 2, 80),
    (1, 19, 7, 90, 1, 256),
    (1, 300, 420, 700, 2, 64),
]


def make(batch: int, rows: int | None, heads: int, dim: int, dtype: torch.dtype) -> Tensor | None:
    """A strided [B, L, N, D] inside a larger buffer whose other elements are NaN."""
    if rows is None:
        return None
    buffer = torch.full((batch, heads + 1, rows + 2, dim + 3), float("nan"), dtype=dtype)
    view = buffer[:, :heads, 1 : rows + 1, 2 : dim + 2].transpose(1, 2)
    return view.copy_(torch.randn(view.shape))


def inputs(shape: tuple, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    batch, queries, fresh, reference, heads, dim = shape
    return [make(batch, n, heads, dim, dtype) for n in (queries, fresh, fresh, reference, reference)]


def dense(q, k, v, ref_k, ref_v, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over concatenated keys under an additive mask [L, S + R], step by step."""
    keys = torch.cat([x for x in (k, ref_k) if x is not None], 1)
    values = torch.cat([x for x in (v, ref_v) if x is not None], 1)
    scores = torch.einsum("blnd,bsnd->bnls", q, keys) * scale
    if mask is not None:
        scores = scores + mask
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), values), scores.logsumexp(-1)


def band_mask(rows: int, num_frames: int, radius: int, reference: int) -> Tensor:
    frame = torch.arange(rows) // (rows // num_frames)
    far = (frame[:, None] - frame).abs() > radius
    mask = torch.zeros(rows, rows + reference, dtype=torch.float64)
    mask[:, :rows].masked_fill_(far, float("-inf"))
    return mask


def plain(q, k, v, ref_k, ref_v, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch's own attention on the same inputs in their dtype."""
    keys, values = (torch.cat([x for x in p if x is not None], 1).transpose(1, 2) for p in ((k, ref_k), (v, ref_v)))
    mask = None if mask is None else mask.to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale
    ).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES[:6])
def test_sparse_definition_is_dense_attention(shape):
    args = doubled(*inputs(shape))
    out, lse = _sparse_ref(*args, 0.3)
    want, want_lse = dense(*args, 0.3)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_frames", "radius"), [(1, 0), (5, 0), (5, 1), (5, 2), (5, 9), (15, 3)])
@pytest.mark.parametrize("reference", [None, 11])
def test_local_definition_is_dense_masked_attention(num_frames, radius, reference):
    args = doubled(*inputs((2, 15, 15, reference, 2, 8)))
    out, lse = _local_ref(*args, num_frames, radius, 0.3)
    want, want_lse = dense(*args, 0.3, band_mask(15, num_frames, radius, reference or 0))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_kernel_accuracy(shape, dtype, isa):
    args = inputs(shape, dtype)
    scale = shape[-1] ** -0.5
    truth, truth_lse = _sparse_ref(*doubled(*args), scale)
    out, lse = run_native(*args, 1, 0, scale, isa=isa)
    assert_accurate(out, plain(*args, scale), truth)
    wide = [None if x is None else x.float() for x in args]
    assert_accurate(lse, dense(*wide, scale)[1], truth_lse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "num_frames", "radius", "reference"), [(6, 6, 1, None), (85, 5, 1, 130), (280, 4, 0, 3), (84, 3, 7, 9)]
)
def test_local_kernel_accuracy(rows, num_frames, radius, reference, dtype, isa):
    args = inputs((2, rows, rows, reference, 2, 64), dtype)
    truth, truth_lse = _local_ref(*doubled(*args), num_frames, radius, 0.125)
    out, lse = run_native(*args, num_frames, radius, 0.125, isa=isa)
    mask = band_mask(rows, num_frames, radius, reference or 0)
    assert_accurate(out, plain(*args, 0.125, mask), truth)
    wide = [None if x is None else x.float() for x in args]
    assert_accurate(lse, dense(*wide, 0.125, mask.float())[1], truth_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_scores(dtype):
    """Scores far apart and a maximum that keeps rising: every block rescales what came before."""
    q, k, v, ref_k, ref_v = inputs((1, 33, 300, 200, 1, 32), dtype)
    q.copy_(torch.ones(q.shape))
    k.copy_(torch.linspace(-8, 2, 300)[None, :, None, None].expand(k.shape))
    ref_k.copy_(torch.linspace(2, 9, 200)[None, :, None, None].expand(ref_k.shape))
    args = (q, k, v, ref_k, ref_v)
    truth, _ = _sparse_ref(*doubled(*args), 1.0)
    for isa in ISAS:
        assert_accurate(run_native(*args, 1, 0, 1.0, isa=isa)[0], plain(*args, 1.0), truth)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_its_own_row_only(dtype, isa):
    """Bit for bit: not on a repeat, on threads, on batch neighbours, on other heads or on other queries."""
    args = inputs((2, 150, 130, 99, 3, 64), dtype)
    out, lse = run_native(*args, 1, 0, 0.125, isa=isa, num_threads=1)
    for threads in (1, 2, 5):
        again, again_lse = run_native(*args, 1, 0, 0.125, isa=isa, num_threads=threads)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)
    alone, _ = run_native(*[x[1:] for x in args], 1, 0, 0.125, isa=isa)
    assert torch.equal(out[1:], alone)
    one_head, _ = run_native(*[x[:, :, 2:] for x in args], 1, 0, 0.125, isa=isa)
    assert torch.equal(out[:, :, 2:], one_head)
    few, few_lse = run_native(args[0][:, 77:80], *args[1:], 1, 0, 0.125, isa=isa)
    assert torch.equal(out[:, 77:80], few)
    assert torch.equal(lse[:, :, 77:80], few_lse)
    args[0][0, 3] = float("nan")
    poisoned, _ = run_native(*args, 1, 0, 0.125, isa=isa)
    assert poisoned[0, 3].isnan().all()
    poisoned[0, 3] = out[0, 3]
    assert torch.equal(out, poisoned)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_of_a_large_call(isa):
    """Large enough that threads do start."""
    args = inputs((1, 520, 300, 100, 2, 64))
    one, _ = run_native(*args, 1, 0, 0.125, isa=isa, num_threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(one, run_native(*args, 1, 0, 0.125, isa=isa, num_threads=threads)[0])
    one, _ = run_native(args[0][:, :300], *args[1:], 20, 4, 0.125, isa=isa, num_threads=1)
    many, _ = run_native(args[0][:, :300], *args[1:], 20, 4, 0.125, isa=isa, num_threads=4)
    assert torch.equal(one, many)


def test_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    args = inputs((1, 400, 300, 100, 2, 64))
    want, _ = run_native(*args, 1, 0, 0.125, num_threads=1)
    with ThreadPoolExecutor(3) as pool:
        for got, _ in pool.map(lambda _: run_native(*args, 1, 0, 0.125, num_threads=2), range(12)):
            assert torch.equal(got, want)


def test_ops_take_the_kernel_and_return_its_lse():
    args = inputs((2, 20, 20, 6, 2, 16))
    out, lse = sparse_reference_attention(*args, return_lse=True)
    want, want_lse = run_native(*args, 1, 0, 0.25)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(sparse_reference_attention(*args), out)
    local = local_temporal_attention(*args, num_frames=4, radius=1)
    assert torch.equal(local, run_native(*args, 4, 1, 0.25)[0])
    whole = local_temporal_attention(*args, num_frames=4, radius=3)
    assert torch.equal(whole, out)


def test_no_queries_and_empty_segments():
    q, k, v, ref_k, ref_v = inputs((2, 9, 4, 3, 2, 8))
    assert sparse_reference_attention(q[:, :0], k, v).shape == (2, 0, 2, 8)
    without = sparse_reference_attention(q, k, v)
    assert torch.equal(sparse_reference_attention(q, k, v, ref_k[:, :0], ref_v[:, :0]), without)
    assert torch.equal(sparse_reference_attention(q, None, None, k, v), without)


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients(return_lse):
    def leaf(rows):
        return torch.randn(2, rows, 2, 4, dtype=torch.float64, requires_grad=True)

    q, k, v, ref_k, ref_v = leaf(6), leaf(6), leaf(6), leaf(3), leaf(3)

    def sparse(*args):
        return sparse_reference_attention(*args, return_lse=return_lse)

    def local(*args):
        return local_temporal_attention(*args, num_frames=3, radius=1, return_lse=return_lse)

    with force(OPS[0], "reference"), force(OPS[1], "reference"):
        assert torch.autograd.gradcheck(sparse, (q, k, v, ref_k, ref_v))
        assert torch.autograd.gradcheck(lambda a, b, c: sparse(a, None, None, b, c), (q, ref_k, ref_v))
        assert torch.autograd.gradcheck(sparse, (q, ref_k, ref_v))
        assert torch.autograd.gradcheck(local, (q, k, v, ref_k, ref_v))
        assert torch.autograd.gradcheck(local, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_the_kernel(dtype):
    args = [x.clone().requires_grad_() for x in inputs((2, 40, 40, 30, 2, 32), dtype)]
    grad = torch.randn(2, 40, 2, 32, dtype=dtype)
    for op in (sparse_reference_attention, lambda *a: local_temporal_attention(*a, num_frames=5, radius=1)):
        mask = None if op is sparse_reference_attention else band_mask(40, 5, 1, 30)
        got = torch.autograd.grad(op(*args), args, grad)
        by_torch = torch.autograd.grad(plain(*args, 32**-0.5, mask), args, grad)
        wide = [x.detach().double().requires_grad_() for x in args]
        truth = torch.autograd.grad(dense(*wide, 32**-0.5, mask)[0], wide, grad.double())
        for a, b, c in zip(got, by_torch, truth):
            assert_accurate(a, b, c)


STRENGTHS = (0.0, 0.5, 1.0, 2.0)


def weighted_mask(rows: int, num_frames: int, radius: int, reference: int, strength: float) -> Tensor:
    mask = band_mask(rows, num_frames, radius, reference)
    mask[:, rows:] = torch.tensor(strength, dtype=torch.float64).log()
    return mask


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_multiplies_reference_weights(dtype, isa, strength):
    """Both ops: the definition against a dense additive mask of log(strength), the kernel against the definition."""
    args = inputs((2, 70, 70, 131, 2, 64), dtype)
    wide = doubled(*args)
    for num_frames, radius in ((1, 0), (7, 1)):
        mask = weighted_mask(70, num_frames, radius, 131, strength)
        truth, truth_lse = _local_ref(*wide, num_frames, radius, 0.125, strength)
        want, want_lse = dense(*wide, 0.125, mask)
        torch.testing.assert_close(truth, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(truth_lse, want_lse, rtol=0, atol=1e-12)
        out, lse = run_native(*args, num_frames, radius, 0.125, strength, isa=isa)
        assert_accurate(out, plain(*args, 0.125, mask), truth)
        assert_accurate(lse, dense(*[x.float() for x in args], 0.125, mask.float())[1], truth_lse)


def test_strength_0_and_1_are_no_reference_and_a_plain_one():
    q, k, v, ref_k, ref_v = inputs((2, 20, 20, 97, 2, 16))
    for op in (sparse_reference_attention, lambda *a, **s: local_temporal_attention(*a, num_frames=4, radius=1, **s)):
        assert torch.equal(op(q, k, v, ref_k, ref_v, strength=0.0), op(q, k, v))
        assert torch.equal(op(q, k, v, ref_k, ref_v, strength=1.0), op(q, k, v, ref_k, ref_v))
    alone, lse = sparse_reference_attention(q, None, None, ref_k, ref_v, return_lse=True)
    louder, louder_lse = sparse_reference_attention(q, None, None, ref_k, ref_v, strength=8.0, return_lse=True)
    torch.testing.assert_close(louder, alone)  # a factor on all of the rows cancels
    torch.testing.assert_close(louder_lse, lse + torch.log(torch.tensor(8.0)))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_strength_in_gradients(strength):
    q, k, v, ref_k, ref_v = (x.requires_grad_() for x in doubled(*inputs((2, 6, 6, 3, 2, 4))))
    with force(OPS[0], "reference"), force(OPS[1], "reference"):
        for op in (
            sparse_reference_attention,
            lambda *a, **s: local_temporal_attention(*a, num_frames=3, radius=1, **s),
        ):
            for lse in (False, True):
                check = lambda *a, op=op, lse=lse: op(*a, strength=strength, return_lse=lse)  # noqa: E731
                assert torch.autograd.gradcheck(check, (q, k, v, ref_k, ref_v))


def test_autocast_makes_one_dtype_of_many():
    q, k, v, ref_k, ref_v = inputs((1, 8, 8, 4, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_reference_attention(q, k.bfloat16(), v, ref_k, ref_v.bfloat16())
    low = [x.bfloat16() for x in (q, k, v, ref_k, ref_v)]
    assert torch.equal(out, sparse_reference_attention(*low))


def test_opcheck():
    q, k, v, ref_k, ref_v = (x.clone().requires_grad_() for x in inputs((2, 6, 6, 3, 2, 4)))
    opcheck(torch.ops.avatar_rt.sparse_reference_attention, (q, k, v, ref_k, ref_v, 0.5, 1.5))
    opcheck(
        torch.ops.avatar_rt.sparse_reference_attention,
        (q, None, None, ref_k, ref_v, 0.5, 1.0),
        test_utils=("test_schema", "test_faketensor"),
    )
    opcheck(torch.ops.avatar_rt.local_temporal_attention, (q, k, v, ref_k, ref_v, 3, 1, 0.5, 0.5))


def test_cost_counts_attended_pairs():
    q, k, v, ref_k, ref_v = inputs((2, 12, 12, 5, 3, 8))
    assert cost("sparse_reference_attention", q, k, v, ref_k, ref_v, 1.0, 1.0)[0] == 4 * 2 * 3 * 8 * 12 * (12 + 5)
    pairs = 12 * 5 + 4 * 4 * (2 + 3 + 2)
    flops, moved = cost("local_temporal_attention", q, k, v, ref_k, ref_v, 3, 1, 1.0, 1.0)
    assert flops == 4 * 2 * 3 * 8 * pairs
    assert moved == 4 * 2 * 3 * (8 * (2 * 12 + 2 * 12 + 2 * 5) + 12)


def row(rows=4, heads=2, dim=8, dtype=torch.float32):
    return torch.zeros(1, rows, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: sparse_reference_attention(row()[0], row(), row()),
            "q: expected 4 dimensions [B, L, N, D], got shape",
        ),
        (
            lambda: sparse_reference_attention(row(), row(heads=3), row(heads=3)),
            "k: expected N=2, got 3 (shape [1, 4, 3, 8] for [B, S, N, D])",
        ),
        (lambda: sparse_reference_attention(row(), row(5), row(6)), "v: expected S=5, got 6"),
        (lambda: sparse_reference_attention(row(), row(), None), "v: expected a tensor beside k, got None"),
        (lambda: sparse_reference_attention(row(), None, row()), "k: expected a tensor beside v, got None"),
        (lambda: sparse_reference_attention(row(), None, None), "expected at least one key row, got none"),
        (
            lambda: sparse_reference_attention(row(), row(dtype=torch.bfloat16), row()),
            "k: expected dtype float32 like q, got bfloat16",
        ),
        (lambda: sparse_reference_attention(row(dtype=torch.int64), row(), row()), "q: expected a floating dtype"),
        (lambda: sparse_reference_attention(row(), row(), row(), scale=0.0), "scale: expected a finite number above 0"),
        (
            lambda: sparse_reference_attention(row(), row(), row(), strength=-1),
            "strength: expected a finite number of 0",
        ),
        (lambda: sparse_reference_attention(row(), row(), row(), strength=float("nan")), "of 0 or more, got nan"),
        (
            lambda: local_temporal_attention(row(), row(), row(), num_frames=1, radius=0, strength=1e39),
            "strength: expected a finite number of 0 or more, got 1e+39",
        ),
        (
            lambda: sparse_reference_attention(row(), None, None, row(), row(), strength=0),
            "k: expected at least one fresh row at strength 0, got none",
        ),
        (
            lambda: sparse_reference_attention(row().transpose(2, 3), row(), row()),
            "q: expected a contiguous last dimension, got strides",
        ),
        (
            lambda: local_temporal_attention(row(), row(), row(), num_frames=3, radius=1),
            "num_frames: expected a divisor of L=4, got 3",
        ),
        (lambda: local_temporal_attention(row(), row(), row(), num_frames=2, radius=-1), "radius: expected 0 or more"),
        (
            lambda: local_temporal_attention(row(), row(6), row(6), num_frames=2, radius=1),
            "k: expected L=4 rows as in q",
        ),
        (
            lambda: force("sparse_reference_attention", "magic").__enter__(),
            "expected an implementation out of cuda, triton, cpu, ref",
        ),
        (lambda: explain("sparse"), "op: expected one of"),
    ],
)
def test_input_errors(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)


def test_refusals_are_listed():
    wide = row(dtype=torch.float64)
    with pytest.raises(UnsupportedError) as caught:
        sparse_reference_attention(wide, wide, wide)
    assert str(caught.value).split("\n") == [
        "sparse_reference_attention: no implementation can run this call",
        "  cuda: q is on cpu",
        "  triton: q is on cpu",
        "  cpu: dtype float64 is neither float32 nor bfloat16",
        "  reference: runs only when forced",
    ]
    big = row(dim=300)
    with pytest.raises(UnsupportedError, match="cpu: D=300 is above 256"):
        local_temporal_attention(big, big, big, num_frames=1, radius=0)
    x = row()
    gpu = dict.fromkeys(("cuda", "triton"), "q is on cpu")
    args = (x, x, x, None, None, 1.0, 1.0)
    assert explain(OPS[0], *args) == {**gpu, "cpu": None, "reference": "runs only when forced"}
    with force(OPS[0], "reference"):
        others = dict.fromkeys(("cuda", "triton", "cpu"), "reference is forced")
        assert explain(OPS[0], *args) == {**others, "reference": None}
        assert sparse_reference_attention(wide, wide, wide).dtype == torch.float64
    assert set(OPS) <= set(_dispatch.ops())
