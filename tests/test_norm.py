"""QK norm with rotation, AdaLN modulation, gated residual."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_accurate, doubled
from torch.library import opcheck

from avatar_rt.errors import InputError
from avatar_rt.ops import cost, gate_residual, layernorm_modulate, qk_norm_rope

DTYPES = [torch.float32, torch.bfloat16]


def strided(*shape, dtype=torch.float32):
    """A view whose neighbours in memory are NaN."""
    buffer = torch.full((*shape[:-1], shape[-1] + 3), float("nan"), dtype=dtype)
    return buffer[..., 2 : shape[-1] + 2].copy_(torch.randn(shape))


def norm_rope(x, weight, cos, sin, eps=1e-6):
    """The definition, pair by pair."""
    flat = x.flatten(2)
    y = (flat * (flat.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).view(x.shape)
    even, odd = y[..., 0::2], y[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def modulate(x, shift, scale, index, eps=1e-6):
    if index is None:
        index = torch.arange(x.shape[1]) // (x.shape[1] // shift.shape[1])
    y = (x - x.mean(-1, keepdim=True)) * (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    return y * (1 + scale[:, index]) + shift[:, index]


def gated(x, y, gate, index):
    if index is None:
        index = torch.arange(x.shape[1]) // (x.shape[1] // gate.shape[1])
    return x + y * gate[:, index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 10), (1, 200, 4, 64)])
def test_qk_norm_rope(shape, dtype):
    _, rows, heads, dim = shape
    x, weight = strided(*shape, dtype=dtype), torch.randn(heads * dim)
    angle = torch.rand(rows, dim // 2) * 6
    args = (x, weight, angle.cos(), angle.sin())
    got = qk_norm_rope(*args)
    assert_accurate(got, norm_rope(*args).to(dtype), norm_rope(*doubled(*args)))
    assert torch.equal(got, qk_norm_rope(*args))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x = torch.randn(1, 1, 2, 16).expand(1, 9, 2, 16)
    angle = torch.arange(9.0)[:, None] * torch.rand(8)
    y = qk_norm_rope(x, torch.ones(32), angle.cos(), angle.sin())
    torch.testing.assert_close(y.norm(dim=(2, 3)), torch.full((1, 9), 32**0.5))
    dots = torch.einsum("lnd,mnd->lm", y[0], y[0])
    torch.testing.assert_close(dots.diagonal(3), dots[0, 3].expand(6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 6, 3, 7), (2, 180, 9, 64)])
def test_layernorm_modulate_and_gate_residual(shape, indexed, row_dtype, dtype):
    batch, rows, frames, width = shape
    index = torch.randint(0, frames, (rows,)) if indexed else None
    x, y = strided(batch, rows, width, dtype=dtype), strided(batch, rows, width, dtype=row_dtype)
    shift, scale = (strided(batch, frames, width, dtype=row_dtype) for _ in range(2))
    got = layernorm_modulate(x, shift, scale, index)
    assert_accurate(got, modulate(x, shift, scale, index).to(dtype), modulate(*doubled(x, shift, scale), index))
    assert torch.equal(got, layernorm_modulate(x, shift, scale, index))
    got = gate_residual(x, y, scale, index)
    assert_accurate(got, gated(x, y, scale, index).to(dtype), gated(*doubled(x, y, scale), index))
    assert torch.equal(got, gate_residual(x, y, scale, index))


@pytest.mark.parametrize("index", [None, torch.tensor([0, 2, 2, 1, 0, 0])])
def test_gradients(index):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, y, shift, scale = leaf(2, 6, 5), leaf(2, 6, 5), leaf(2, 3, 5), leaf(2, 3, 5)
    assert torch.autograd.gradcheck(lambda *a: layernorm_modulate(*a, index), (x, shift, scale))
    assert torch.autograd.gradcheck(lambda *a: gate_residual(*a, index), (x, y, scale))
    angle = torch.rand(6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, w: qk_norm_rope(a, w, angle.cos(), angle.sin()), (leaf(2, 6, 2, 4), leaf(8))
    )


def test_gradients_keep_the_dtypes_of_their_tensors():
    x = torch.randn(1, 4, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.randn(1, 2, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    table = torch.rand(4, 2)
    y = qk_norm_rope(x, weight, table, table).flatten(2)
    gate_residual(layernorm_modulate(y, rows, rows), y, rows).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == rows.grad.dtype == torch.float32


def test_opcheck():
    x, rows = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    table, weight = torch.rand(6, 2), torch.randn(8, requires_grad=True)
    opcheck(
        torch.ops.avatar_rt.qk_norm_rope, (x.detach().view(2, 6, 2, 4).requires_grad_(), weight, table, table, 1e-6)
    )
    for each in (None, index):
        opcheck(torch.ops.avatar_rt.layernorm_modulate, (x, rows, rows.detach().clone(), each, 1e-6))
        opcheck(torch.ops.avatar_rt.gate_residual, (x, x.detach().clone(), rows, each))


def test_cost():
    x, rows, weight, table = torch.zeros(2, 6, 8), torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(6, 2)
    assert cost("qk_norm_rope", x.view(2, 6, 2, 4), weight, table, table, 1e-6)[1] == 4 * (2 * 96 + 8 + 24)
    assert cost("layernorm_modulate", x, rows, rows, None, 1e-6)[1] == 4 * (2 * 96 + 2 * 48)
    assert cost("gate_residual", x, x, rows, None) == (2 * 96, 4 * (3 * 96 + 48))


X, ROWS = torch.zeros(1, 6, 4), torch.zeros(1, 3, 4)
HEADS = torch.zeros(1, 6, 2, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: layernorm_modulate(X, ROWS, torch.zeros(1, 3, 5)),
            "scale: expected C=4, got 5 (shape [1, 3, 5] for [B, T, C])",
        ),
        (
            lambda: layernorm_modulate(X, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)),
            "x: expected L a multiple of T=4 when index is None, got L=6",
        ),
        (lambda: layernorm_modulate(X, ROWS, ROWS, torch.zeros(5, dtype=torch.int64)), "index: expected L=6, got 5"),
        (lambda: layernorm_modulate(X, ROWS, ROWS, torch.zeros(6)), "index: expected dtype int64, got float32"),
        (lambda: layernorm_modulate(X, ROWS, ROWS, eps=0.0), "eps: expected a finite number above 0, got 0.0"),
        (lambda: gate_residual(X, X[:, :3], ROWS), "y: expected L=6, got 3"),
        (lambda: gate_residual(X.long(), X, ROWS), "x: expected a floating dtype, got int64"),
        (lambda: qk_norm_rope(torch.zeros(1, 6, 2, 3), *[torch.zeros(6)] * 3), "x: expected an even D, got 3"),
        (
            lambda: qk_norm_rope(HEADS, torch.zeros(4), torch.zeros(6, 2), torch.zeros(6, 2)),
            "weight: expected N*D=8, got 4",
        ),
        (
            lambda: qk_norm_rope(HEADS, torch.zeros(8), torch.zeros(6, 4), torch.zeros(6, 2)),
            "cos: expected D/2=2, got 4",
        ),
    ],
)
def test_input_errors(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)
