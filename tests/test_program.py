"""Recorded kernels against fp64: products, convolutions, norms, attention; the same bits on any number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_accurate, typical
from torch import Tensor

from avatar_rt import ops
from avatar_rt.errors import InputError
from avatar_rt.ops.program import Program, Table, pack_linear, refuses_program, rope_lanes
from avatar_rt.ops.schedule import torch_alone

REASON = refuses_program(torch.device("cpu"), torch.bfloat16)
needs_kernels = pytest.mark.skipif(REASON is not None, reason=REASON or "")
BF16 = torch.bfloat16


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(BF16)


def _ran(record) -> None:
    program = Program()
    record(program)
    program.run(1)


def test_who_is_refused() -> None:
    assert refuses_program(torch.device("cpu"), torch.float32) == "dtype float32 is not bfloat16"
    assert "weights are on meta" in (refuses_program(torch.device("meta"), BF16) or "")


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("outputs", [12, 16, 40, 96, 130])
def test_linear_at_every_width(rows: int, outputs: int) -> None:
    x, w, b = _random(rows, 72)[:, 4:68], _random(outputs, 64, scale=0.1), torch.randn(outputs)
    truth = F.linear(x.double(), w.double(), b.double())
    y = torch.full((rows, outputs + 3), float("nan"), dtype=BF16)
    _ran(lambda p: p.linear(x, pack_linear(w, b), y[:, :outputs]))
    assert_accurate(y[:, :outputs], F.linear(x, w, b.to(BF16)), truth)
    assert y[:, outputs:].isnan().all()
    wide = torch.zeros(rows, outputs)
    _ran(lambda p: p.linear(x, pack_linear(w, b), wide))
    assert_accurate(wide, F.linear(x.float(), w.float(), b), truth)


@needs_kernels
def test_gelu_and_gated_residual() -> None:
    x, w, b = _random(50, 64), _random(32, 64, scale=0.3), torch.randn(32)
    truth = F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")
    y = torch.zeros(50, 32, dtype=BF16)
    _ran(lambda p: p.linear(x, pack_linear(w, b), y, finish="gelu"))
    assert_accurate(y, F.gelu(F.linear(x, w, b.to(BF16)), approximate="tanh"), truth)
    rows, gate, plus = torch.randn(50, 32), torch.randn(3, 32), torch.randn(2, 32)
    which, other = torch.arange(50).remainder(3).int(), torch.arange(50).remainder(2).int()
    want = rows.double() + F.linear(x.double(), w.double(), b.double()) * gate[which] + plus[other]
    plain = rows + F.linear(x, w, b.to(BF16)).float() * gate[which] + plus[other]
    _ran(
        lambda p: p.linear(
            x, pack_linear(w, b), rows, finish="residual", gate=Table(gate, which), plus=Table(plus, other)
        )
    )
    assert_accurate(rows, plain, want)


@needs_kernels
def test_convolution_by_taps() -> None:
    pictures, w = _random(2, 5, 7, 16), _random(24, 16, 3, 3, scale=0.1)
    inner = torch.zeros(2, 7, 9, 16, dtype=BF16)
    inner[:, 1:-1, 1:-1] = pictures
    x, y = inner[:, 1:-1, 1:-1], torch.zeros(2, 5, 7, 24)
    taps = [(i - 1) * x.stride(1) + (j - 1) * x.stride(2) for i in range(3) for j in range(3)]
    _ran(lambda p: p.linear(x, pack_linear(w.flatten(2).transpose(1, 2), None), y, taps=taps))
    truth = F.conv2d(pictures.double().permute(0, 3, 1, 2), w.double(), padding=1).permute(0, 2, 3, 1)
    plain = F.conv2d(pictures.float().permute(0, 3, 1, 2), w.float(), padding=1).permute(0, 2, 3, 1)
    assert_accurate(y, plain, truth)


@needs_kernels
@pytest.mark.parametrize("kind", ["layer", "rms", "length", "none"])
def test_norms(kind: str) -> None:
    x, scale, shift = torch.randn(9, 32) * 3 + 1, torch.randn(2, 32), torch.randn(2, 32)
    index = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1]).int()

    def formula(x: Tensor) -> Tensor:
        if kind == "layer":
            x = F.layer_norm(x, (32,), eps=1e-6)
        elif kind == "rms":
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        elif kind == "length":
            x = F.normalize(x, dim=-1) * 32**0.5
        return F.silu(x * scale[index].to(x.dtype) + shift[index].to(x.dtype))

    y = torch.zeros(9, 32, dtype=BF16)
    _ran(lambda p: p.norm(kind, x, y, eps=1e-6, scale=Table(scale, index), shift=Table(shift, index), silu=True))
    assert_accurate(y, formula(x).to(BF16), formula(x.double()))


@needs_kernels
def test_norm_with_rotation_is_the_op() -> None:
    x, weight = _random(1, 6, 2, 32), torch.rand(64)
    angle = torch.rand(6, 16)
    want = ops.qk_norm_rope(x.double(), weight.double(), angle.double().cos(), angle.double().sin())
    plain = ops.qk_norm_rope(x, weight, angle.cos(), angle.sin())
    y = x.flatten(2)[0].clone()
    rope = rope_lanes(angle.cos(), angle.sin())
    _ran(lambda p: p.norm("rms", y, y, eps=1e-6, scale=Table(weight[None]), rope=rope))
    assert_accurate(y.view(x.shape), plain, want)


@needs_kernels
def test_attention_is_the_op_bit_for_bit_on_any_threads() -> None:
    q, k, v = (_random(2, 130, 2, 32) for _ in range(3))
    ref_k, ref_v = (_random(2, 33, 2, 32) for _ in range(2))
    want = ops.sparse_reference_attention(q, k, v, ref_k, ref_v)
    packed = ops.pack_reference(ref_k, ref_v)
    for reference in ((ref_k, ref_v), packed):
        out = torch.zeros_like(q)
        program = Program()
        program.attention(q, k, v, out, reference=reference)
        for threads in (1, 2):
            program.run(threads)
            assert torch.equal(out, want)


@needs_kernels
def test_same_bits_on_any_threads() -> None:
    x, w = _random(300, 64), _random(96, 64)
    results = []
    for threads in (1, 2, 3):
        y, h = torch.zeros(300, 96, dtype=BF16), torch.zeros(300, 96, dtype=BF16)
        program = Program()
        program.linear(x, pack_linear(w, None), y, finish="gelu")
        program.norm("layer", y, h, eps=1e-6)
        for _ in range(20):
            program.run(threads)
        results.append(h)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert typical(results[0], F.layer_norm(y.double(), (96,), eps=1e-6)) < 1e-2


@needs_kernels
def test_wrong_shapes_are_said() -> None:
    program, weight = Program(), pack_linear(_random(8, 16), None)
    with pytest.raises(InputError, match="expected 1 taps and 16 -> 8 channels"):
        program.linear(_random(4, 18), weight, torch.zeros(4, 8))
    with pytest.raises(InputError, match="y: expected dtype"):
        program.linear(_random(4, 16), weight, torch.zeros(4, 8, dtype=BF16), finish="residual")
    with pytest.raises(InputError, match="multiples of 16"):
        program.norm("layer", torch.zeros(4, 8), torch.zeros(4, 8, dtype=BF16))
    with pytest.raises(InputError, match="index: expected values in"):
        index = torch.tensor([0, 1, 2, 3]).int()
        program.norm("rms", torch.zeros(4, 16), torch.zeros(4, 16, dtype=BF16), scale=Table(torch.ones(3, 16), index))
    with pytest.raises(InputError, match="even C"):
        pack_linear(torch.zeros(4, 3), None)
    assert len(program) == 0


def test_torch_alone_leaves_threads_that_begin_meanwhile_alone() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch_alone() as had:
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
        assert (had, seen, torch.get_num_threads()) == (3, [3, 1], 3)
    finally:
        torch.set_num_threads(before)
