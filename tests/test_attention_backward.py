"""Gradients of both attention ops: the definition by finite differences, the CPU kernel against fp64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from test_attention import ISAS, band_mask, dense, inputs, make, plain
from tolerance import assert_accurate, doubled, typical, worst
from torch import Tensor
from torch.library import opcheck

from avatar_rt.errors import InputError
from avatar_rt.ops import _load, cost, explain, force, local_temporal_attention, sparse_reference_attention
from avatar_rt.ops._attention_backward import _definition, run_native_backward
from avatar_rt.ops.attention import run_native

ALL = [True] * 5
DTYPES = [torch.float32, torch.bfloat16]

# (batch, queries, fresh rows, reference rows, heads, head dim): smallest, ragged, large; None: no such segment.
SHAPES = [
    (1, 1, 1, None, 1, 1),
    (1, 1, None, 1, 1, 2),
    (1, 3, 2, 1, 1, 7),
    (2, 70, 97, 5, 3, 64),
    (1, 65, 3, 191, 2, 33),
    (1, 97, None, 96, 2, 128),
    (1, 17, 193, None, 2, 80),
    (1, 130, 7, 90, 1, 256),
    (1, 300, 420, 700, 2, 64),
    (2, 111, 40, 61, 2, 112),
]


def bias_of(args: list[Tensor | None], strength: float, mask: Tensor | None = None) -> Tensor:
    """[L, S + R] in fp64: the band's mask, and log(strength) on the reference rows."""
    fresh, reference = (0 if x is None else x.shape[1] for x in (args[1], args[3]))
    bias = torch.zeros(args[0].shape[1], fresh + reference, dtype=torch.float64) if mask is None else mask.clone()
    bias[:, fresh:] += math.log(strength)
    return bias


def gradients(function, args: list[Tensor | None], grad: Tensor, grad_lse: Tensor | None = None) -> list[Tensor]:
    """Autograd through ``function(*args) -> out, lse`` for each argument that is a tensor."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in args]
    out, lse = function(*leaves)
    objective = (out * grad).sum() if grad_lse is None else (out * grad).sum() + (lse * grad_lse).sum()
    return list(torch.autograd.grad(objective, [x for x in leaves if x is not None]))


def check(
    args, grad, scale, num_frames=1, radius=0, mask=None, strength=1.0, grad_lse=None, isa=None, fused_only=False
) -> None:
    """The kernel against fp64, allowed twice what plain torch errs in the same dtype.

    Torch has two ways, fused and step by step. In root mean square the kernel is held against the better of them; its
    worst element, which is one draw, against the worse. With scores in the hundreds the saved LSE's rounding rules,
    which only the fused way shares: ``fused_only``.
    """
    bias = bias_of(args, strength, mask)
    wide_grad_lse = None if grad_lse is None else grad_lse.double()
    truth = gradients(lambda *a: dense(*a, scale, bias), doubled(*args), grad.double(), wide_grad_lse)
    by_torch = [gradients(lambda *a: dense(*a, scale, bias.to(grad.dtype)), args, grad, grad_lse)]
    if grad_lse is None:
        low = None if mask is None and strength == 1 else bias
        by_torch.append(gradients(lambda *a: (plain(*a, scale, low), None), args, grad))
    out, lse = run_native(*args, num_frames, radius, scale, strength, isa=isa)
    got = run_native_backward(grad, grad_lse, *args, out, lse, num_frames, radius, scale, strength, ALL, isa=isa)
    for a, c, *each in zip(got, truth, *by_torch, strict=True):
        assert_accurate(a, max(each, key=lambda b: worst(b, c)), c)
        if c.numel() >= 1000:  # below, the mean itself is a draw
            limit = 2 * min(typical(b, c) for b in each[fused_only:])
            assert typical(a, c) <= limit, f"rms error {typical(a, c):.3e} is above {limit:.3e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_accuracy(shape, dtype, isa):
    """All operands strided, NaN beyond them; grad too."""
    batch, queries, _, _, heads, dim = shape
    check(inputs(shape, dtype), make(batch, queries, heads, dim, dtype), dim**-0.5, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_frames", "radius", "reference"),
    [(6, 6, 1, None), (85, 5, 1, 130), (280, 4, 0, 3), (84, 3, 7, 9), (700, 5, 1, None), (64, 16, 2, 200)],
)
def test_local_accuracy(rows, num_frames, radius, reference, dtype, isa):
    batch = max(2, 360 // rows)  # few numbers have no worst error to speak of: one lucky draw would decide
    args = inputs((batch, rows, rows, reference, 2, 64), dtype)
    mask = band_mask(rows, num_frames, radius, reference or 0)
    check(args, make(batch, rows, 2, 64, dtype), 0.125, num_frames, radius, mask, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.25, 1.0, 3.0])
def test_strength_and_gradient_of_lse(strength, dtype, isa):
    args = inputs((6, 60, 60, 130, 2, 48), dtype)
    grad, grad_lse = make(6, 60, 2, 48, dtype), torch.randn(6, 2, 60)
    check(args, grad, 0.2, strength=strength, isa=isa)
    check(args, grad, 0.2, strength=strength, grad_lse=grad_lse, isa=isa)
    check(args, grad, 0.2, 5, 1, band_mask(60, 5, 1, 130), strength, grad_lse, isa)


def saved(args, num_frames=1, radius=0, scale=0.125):
    """What the forward pass leaves for the backward: (out, lse, num_frames, radius, scale)."""
    if num_frames == 1:
        out, lse = sparse_reference_attention(*args, scale=scale, return_lse=True)
    else:
        band = {"num_frames": num_frames, "radius": radius}
        out, lse = local_temporal_attention(*args, **band, scale=scale, return_lse=True)
    return out, lse, num_frames, radius, scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_frames", "radius"), [(1, 0), (10, 2)])
def test_result_depends_on_nothing_else(num_frames, radius, dtype, isa):
    """Bit for bit: not on a repeat, on threads, on batch neighbours, on other heads."""
    args = inputs((2, 520, 520, 300, 3, 64), dtype)
    grad, rest = make(2, 520, 3, 64, dtype), saved(args, num_frames, radius)
    want = run_native_backward(grad, None, *args, *rest, 1.0, ALL, isa=isa, num_threads=1)
    for threads in (1, 2, 3):
        again = run_native_backward(grad, None, *args, *rest, 1.0, ALL, isa=isa, num_threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    part = [x[1:, :, 2:] for x in args]
    out, lse, *numbers = rest
    alone = run_native_backward(grad[1:, :, 2:], None, *part, out[1:, :, 2:], lse[1:, 2:], *numbers, 1.0, ALL, isa=isa)
    assert all(torch.equal(a[1:, :, 2:], b) for a, b in zip(want, alone, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_beyond_the_band_do_not_matter(dtype, isa):
    """A NaN in a frame reaches the rows that it is in a band with, and no others."""
    q, k, v, *_ = args = inputs((1, 60, 60, None, 2, 32), dtype)
    grad, rest = make(1, 60, 2, 32, dtype), saved(args, 6, 1)
    want = run_native_backward(grad, None, *args, *rest, 1.0, ALL, isa=isa)
    for x in (q, k, v, grad):
        x[:, 0] = float("nan")
    got = run_native_backward(grad, None, *args, *rest, 1.0, ALL, isa=isa)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[:, 30:], b[:, 30:])
    assert got[1][:, :20].isnan().any()


@pytest.mark.parametrize("isa", ISAS)
def test_unwanted_gradients_cost_no_bits(isa):
    args = inputs((1, 100, 60, 130, 2, 32))
    grad, rest = make(1, 100, 2, 32, torch.float32), saved(args)
    want = run_native_backward(grad, None, *args, *rest, 1.0, ALL, isa=isa)
    for wanted in ([True, False, False, False, False], [False, True, False, False, True], [False] * 5):
        got = run_native_backward(grad, None, *args, *rest, 1.0, wanted, isa=isa)
        kept = [x for x, need in zip(want, wanted, strict=True) if need]
        assert all(torch.equal(a, b) for a, b in zip(got, kept, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_scores(dtype, isa):
    """Weights from 1 down to nothing, and an LSE far below zero."""
    args = inputs((1, 33, 480, 20, 1, 32), dtype)
    args[1].mul_(6)
    check(args, make(1, 33, 1, 32, dtype), 1.0, isa=isa, fused_only=True)
    q, k, v, _, _ = inputs((4, 60, 95, None, 2, 32), dtype)
    low = (q.copy_(torch.ones(q.shape)), k.copy_(torch.full(k.shape, -9.0)), v, None, None)
    check(low, make(4, 60, 2, 32, dtype), 1.0, isa=isa, fused_only=True)


def test_strength_zero_is_no_reference():
    args = inputs((1, 30, 20, 40, 2, 16))
    grad = make(1, 30, 2, 16, torch.float32)
    rest = saved([*args[:3], None, None])
    for run in (run_native_backward, _definition):
        got = run(grad, None, *args, *rest, 0.0, ALL)
        want = run(grad, None, *args[:3], None, None, *rest, 1.0, ALL)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], want, strict=True))
        assert not any(x.any() for x in got[3:])


def test_no_queries_and_empty_segments():
    q, k, v, ref_k, ref_v = inputs((2, 9, 4, 3, 2, 8))
    grad = torch.randn(2, 9, 2, 8)
    none = run_native_backward(grad[:, :0], None, q[:, :0], k, v, None, None, *saved((q[:, :0], k, v)), 1.0, ALL)
    assert none[0].shape == (2, 0, 2, 8)
    assert not none[1].any()
    assert not none[2].any()
    rest = saved((q, k, v))
    got = run_native_backward(grad, None, q, k, v, ref_k[:, :0], ref_v[:, :0], *rest, 1.0, ALL)
    want = run_native_backward(grad, None, q, k, v, None, None, *rest, 1.0, ALL)
    assert [x.shape[1] for x in got] == [9, 4, 4, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))


def test_ops_take_the_kernel():
    args = inputs((2, 40, 40, 30, 2, 32))
    leaves = [x.clone().requires_grad_() for x in args]
    grad = torch.randn(2, 40, 2, 32)
    expanded = torch.ones(1, 1, 1, 1).expand(2, 40, 2, 32)  # what sum() hands back: no stride of 1 anywhere
    for num_frames, g in ((1, grad), (5, grad), (1, expanded), (1, grad.transpose(1, 3).contiguous().transpose(1, 3))):
        rest = saved(args, num_frames, 1)
        op = saved(leaves, num_frames, 1)[0]
        got = torch.autograd.grad(op, leaves, g)
        want = run_native_backward(g.contiguous(), None, *args, *rest, 1.0, ALL)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    leaves[1].requires_grad_(False)
    got = torch.autograd.grad(sparse_reference_attention(*leaves), [x for x in leaves if x.requires_grad], grad)
    assert [x.shape[1] for x in got] == [40, 40, 30, 30]


def test_definition_is_the_gradient():
    """Finite differences, with a strength that autograd's formula has to carry."""

    def leaf(rows):
        return torch.randn(2, rows, 2, 4, dtype=torch.float64, requires_grad=True)

    args = [leaf(6), leaf(6), leaf(6), leaf(3), leaf(3)]
    bias = bias_of(args, 0.3, band_mask(6, 3, 1, 3))
    grad, grad_lse = torch.randn(2, 6, 2, 4).double(), torch.randn(2, 2, 6).double()
    truth = gradients(lambda *a: dense(*a, 0.4, bias), args, grad, grad_lse)
    out, lse = dense(*args, 0.4, bias)
    got = _definition(grad, grad_lse, *args, out, lse, 3, 1, 0.4, 0.3, ALL)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck_takes_the_definition():
    q, k, v = (torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with force("sparse_reference_attention", "reference"):
        assert torch.autograd.gradcheck(lambda *a: sparse_reference_attention(*a, return_lse=True), (q, k, v))


def test_opcheck():
    args = inputs((2, 6, 6, 3, 2, 4))
    rest = saved(args, 3, 1)
    grad, grad_lse = torch.randn(2, 6, 2, 4), torch.randn(2, 2, 6)
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.avatar_rt.attention_backward
    opcheck(op, (grad, grad_lse, *args, *rest, 1.0, ALL), test_utils=checks)
    opcheck(op, (grad, None, *args[:3], None, None, *rest, 1.0, [True, False, True, True, True]), test_utils=checks)


def test_traced_backward_is_the_eager_one():
    """Forward and backward in one traced graph, as torch.compile makes it."""
    from torch._functorch.aot_autograd import aot_function

    args = [x.clone().requires_grad_() for x in inputs((1, 20, 20, 6, 2, 8))]

    def loss(*x):
        return (
            sparse_reference_attention(*x).square().sum() + local_temporal_attention(*x, num_frames=4, radius=1).sum()
        )

    want = torch.autograd.grad(loss(*args), args)
    got = torch.autograd.grad(aot_function(loss, lambda graph, _: graph)(*args), args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_cost_counts_attended_pairs():
    args = inputs((2, 12, 12, 5, 3, 8))
    grad, rest = torch.zeros(2, 12, 3, 8), saved(args)
    assert cost("attention_backward", grad, None, *args, *rest, 1.0, ALL)[0] == 10 * 2 * 3 * 8 * 12 * (12 + 5)
    pairs = 12 * 5 + 4 * 4 * (2 + 3 + 2)
    assert cost("attention_backward", grad, None, *args, *rest[:2], 3, 1, 1.0, 1.0, ALL)[0] == 10 * 2 * 3 * 8 * pairs


def test_who_runs_it():
    x = torch.zeros(1, 4, 2, 8)
    lse = torch.zeros(1, 2, 4)

    def reasons(x):
        return explain("attention_backward", x, None, x, x, x, None, None, x, lse, 1, 0, 1.0, 1.0, ALL)

    assert reasons(x) == {"triton": "q is on cpu", "cpu": None, "reference": None}
    assert reasons(x.double())["cpu"] == "dtype float64 is neither float32 nor bfloat16"
    assert reasons(torch.zeros(1, 4, 2, 300))["cpu"] == "D=300 is above 256"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"strength": -1.0}, "strength: expected a finite number of 0 or more, got -1"),
        ({"strength": float("nan")}, "strength: expected a finite number of 0 or more, got nan"),
        ({"grad": torch.zeros(1, 5, 2, 8)}, "grad: expected L=4, got 5"),
        ({"num_frames": 3}, "num_frames: expected a divisor of L=4, got 3"),
        ({"isa": "mmx"}, "isa: expected scalar, avx2, avx512 or avx512bf16, got 'mmx'"),
    ],
)
def test_bindings_check(change, sentence):
    x, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    values = {"grad": x, "num_frames": 1, "strength": 1.0, "isa": None} | change
    with pytest.raises(InputError) as caught:
        run_native_backward(
            values["grad"],
            None,
            x,
            x,
            x,
            None,
            None,
            x,
            lse,
            values["num_frames"],
            0,
            1.0,
            values["strength"],
            ALL,
            isa=values["isa"],
        )
    assert sentence in str(caught.value)
    assert _load.native()[0] is not None
