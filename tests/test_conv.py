"""Causal 3-D convolution with carried state."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_accurate, doubled
from torch.library import opcheck

from avatar_rt.errors import InputError
from avatar_rt.ops import causal_conv3d, cost

# (input [B, C, T, H, W], weight [O, C, kt, kh, kw], stride): smallest, ragged, strided, larger.
CASES = [
    ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1)),
    ((1, 1, 1, 1, 1), (2, 1, 3, 3, 3), (1, 1, 1)),
    ((2, 3, 5, 7, 4), (4, 3, 3, 3, 3), (1, 1, 1)),
    ((1, 2, 4, 5, 6), (3, 2, 1, 3, 5), (1, 2, 2)),
    ((1, 4, 6, 5, 5), (4, 4, 3, 1, 1), (2, 1, 1)),
    ((1, 16, 5, 16, 16), (16, 16, 3, 3, 3), (1, 1, 1)),
]


def make(x_shape, w_shape, dtype=torch.float32, with_state=True):
    batch, channels, _, height, width = x_shape
    buffer = torch.full((*x_shape[:4], width + 2), float("nan"), dtype=dtype)
    x = buffer[..., 1 : width + 1].copy_(torch.randn(x_shape))
    weight, bias = torch.randn(w_shape).to(dtype), torch.randn(w_shape[0]).to(dtype)
    state = torch.randn(batch, channels, w_shape[2] - 1, height, width).to(dtype) if with_state else None
    return x, weight, bias, state


def by_taps(x, weight, bias, state, stride):
    """The definition in fp64, one kernel tap at a time."""
    x, weight, bias, state = doubled(x, weight, bias, state)
    _, _, kt, kh, kw = weight.shape
    if state is None:
        state = x.new_zeros(*x.shape[:2], kt - 1, *x.shape[3:])
    past = torch.cat([state, x], 2)
    padded = torch.nn.functional.pad(past, (kw // 2, kw // 2, kh // 2, kh // 2))
    frames, height, width = x.shape[2:]
    out = bias[None, :, None, None, None].expand(x.shape[0], -1, frames, height, width).clone()
    for t in range(kt):
        for i in range(kh):
            for j in range(kw):
                view = padded[:, :, t : t + frames, i : i + height, j : j + width]
                out += torch.einsum("bcthw,oc->bothw", view, weight[:, :, t, i, j])
    return out[:, :, :: stride[0], :: stride[1], :: stride[2]], past[:, :, frames:]


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("x_shape", "w_shape", "stride"), CASES)
def test_accuracy(x_shape, w_shape, stride, dtype, with_state):
    args = make(x_shape, w_shape, dtype, with_state)
    y, new_state = causal_conv3d(*args, stride=stride)
    truth, truth_state = by_taps(*args, stride)
    state = args[3] if with_state else args[0].new_zeros(x_shape[0], x_shape[1], w_shape[2] - 1, *x_shape[3:])
    padding = (0, w_shape[3] // 2, w_shape[4] // 2)
    plain = torch.nn.functional.conv3d(torch.cat([state, args[0]], 2), *args[1:3], stride=stride, padding=padding)
    assert_accurate(y, plain, truth)
    assert torch.equal(new_state.double(), truth_state)
    again, _ = causal_conv3d(*args, stride=stride)
    assert torch.equal(y, again)


@pytest.mark.parametrize("cut", [(5,), (1, 4), (1, 1, 1, 1, 1), (3, 2)])
def test_any_cut_gives_the_same_video(cut):
    x, weight, bias, _ = make((1, 3, 5, 6, 4), (2, 3, 3, 3, 3))
    whole, whole_state = causal_conv3d(x, weight, bias)
    state, parts = None, []
    for part in x.split(cut, 2):
        y, state = causal_conv3d(part, weight, bias, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)
    assert torch.equal(state, whole_state)


def test_a_frame_sees_no_later_frame():
    x, weight, bias, state = make((1, 2, 4, 5, 5), (2, 2, 3, 3, 3))
    before, _ = causal_conv3d(x, weight, bias, state)
    x[:, :, 3] = 7.0
    after, _ = causal_conv3d(x, weight, bias, state)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_gradients():
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias, state = leaf(1, 2, 3, 4, 3), leaf(2, 2, 3, 3, 3), leaf(2), leaf(1, 2, 2, 4, 3)
    assert torch.autograd.gradcheck(causal_conv3d, (x, weight, bias, state))
    assert torch.autograd.gradcheck(lambda *a: causal_conv3d(*a, stride=(2, 2, 1))[0], (x, weight, bias, state))
    assert torch.autograd.gradcheck(lambda a, b: causal_conv3d(a, b, None), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: causal_conv3d(a, b, None)[1], (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: causal_conv3d(a, b, None)[0], (x, leaf(2, 2, 1, 3, 3)))


def test_opcheck_and_autocast():
    x, weight, bias, state = (a.contiguous().requires_grad_() for a in make((1, 2, 3, 4, 4), (2, 2, 3, 3, 3)))
    opcheck(torch.ops.avatar_rt.causal_conv3d, (x, weight, bias, state, [1, 1, 1]))
    opcheck(torch.ops.avatar_rt.causal_conv3d, (x, weight, None, None, [2, 1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        y, new_state = causal_conv3d(x, weight, bias, state)
    assert y.dtype == new_state.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_cost():
    x, weight, bias, state = make((1, 2, 3, 4, 4), (5, 2, 3, 3, 3))
    flops, moved = cost("causal_conv3d", x, weight, bias, state, [1, 2, 2])
    assert flops == 2 * (5 * 3 * 2 * 2) * (2 * 27)
    assert moved == 4 * (x.numel() + weight.numel() + 5 + 2 * state.numel() + 5 * 3 * 2 * 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": (2, 3, 4, 4)}, "x: expected 5 dimensions [B, C, T, H, W], got shape [2, 3, 4, 4]"),
        ({"weight": (2, 3, 3, 3, 3)}, "weight: expected C=2, got 3 (shape [2, 3, 3, 3, 3] for [O, C, kt, kh, kw])"),
        ({"weight": (2, 2, 3, 2, 3)}, "weight: expected odd kh and kw, got 2 and 3"),
        ({"bias": (3,)}, "bias: expected O=2, got 3"),
        ({"state": (1, 2, 1, 4, 4)}, "state: expected kt-1=2, got 1"),
        ({"x": (1, 2, 0, 4, 4)}, "x: expected at least one frame"),
        ({"stride": (1, 0, 1)}, "stride: expected three numbers of 1 or more, got (1, 0, 1)"),
        ({"dtype": torch.bfloat16}, "weight: expected dtype float32 like x, got bfloat16"),
    ],
)
def test_input_errors(change, sentence):
    shapes = {"x": (1, 2, 3, 4, 4), "weight": (2, 2, 3, 3, 3), "bias": (2,), "state": (1, 2, 2, 4, 4)}
    shapes |= {name: shape for name, shape in change.items() if name in shapes}
    x, weight, bias, state = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(InputError) as caught:
        causal_conv3d(x, weight.to(change.get("dtype")), bias, state, stride=change.get("stride", (1, 1, 1)))
    assert sentence in str(caught.value)
