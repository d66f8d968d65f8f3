"""Triton's kernels: run by its interpreter (fp32; its bf16 products are wrong) or on a GPU, and compiled ahead of time.

The tests that run kernels need a GPU; without one, ``test_all_of_it_under_the_interpreter`` runs them on the CPU in a
process of their own, because Triton decides at its first import which of the two it will be.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_attention import band_mask, dense, make, plain
from test_norm import gated, modulate, norm_rope, strided
from tolerance import assert_accurate, doubled
from torch import Tensor

from avatar_rt import ops
from avatar_rt.ops import _triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
GPU = torch.cuda.is_available() and not INTERPRETED
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if GPU else [torch.float32]
here = pytest.mark.skipif(not INTERPRETED and not GPU, reason="no GPU: interpreted in another process")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

if INTERPRETED or GPU:
    from avatar_rt.kernels import conv, flow, norm
    from avatar_rt.kernels._launch import Config
    from avatar_rt.kernels.attention import attention
    from avatar_rt.kernels.attention_backward import attention_backward


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_it_under_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def there(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same views on the device under test, with all that lies around them in memory."""
    moved: list[Tensor | None] = []
    for x in tensors:
        if x is None or DEVICE == "cpu":
            moved.append(x)
        else:
            base = (x if x._base is None else x._base).to(DEVICE)
            moved.append(base.as_strided(x.size(), x.stride(), x.storage_offset()))
    return moved


def back(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.cpu() for x in tensors]


# --- attention -------------------------------------------------------------------------------------------------------

# (batch, queries, fresh rows, reference rows, heads, head dim): None: no such segment.
SHAPES = [
    (1, 1, 1, None, 1, 1),
    (1, 1, None, 1, 1, 2),
    (2, 40, 37, 5, 2, 64),
    (1, 33, 3, 91, 2, 33),
    (1, 5, None, 64, 1, 128),
    (1, 17, 96, 0, 1, 80),
]
# (rows, frames, radius, reference rows): partial tiles at both ends of a band, a band of everything, one-row frames
BANDS = [(6, 6, 1, None), (85, 5, 1, 33), (68, 2, 0, 3), (42, 3, 7, 9)]


def inputs(shape: tuple, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    batch, queries, fresh, reference, heads, dim = shape
    return [make(batch, n, heads, dim, dtype) for n in (queries, fresh, fresh, reference, reference)]


def mask_of(q, k, ref_k, num_frames=1, radius=0, strength=1.0) -> Tensor:
    """[L, S + R]: the band, and log(strength) on the reference."""
    fresh, reference = (0 if x is None else x.shape[1] for x in (k, ref_k))
    mask = torch.zeros(q.shape[1], fresh + reference, dtype=torch.float64)
    if num_frames > 1:
        mask = band_mask(q.shape[1], num_frames, radius, reference)
    mask[:, fresh:] += math.log(strength)
    return mask


def check_forward(args, num_frames=1, radius=0, strength=1.0, config=None, scale=0.2):
    mask = mask_of(args[0], args[1], args[3], num_frames, radius, strength)
    truth, truth_lse = dense(*doubled(*args), scale, mask)
    device = there(*args)
    out, lse = attention(*device, num_frames, radius, scale, math.log2(strength), config)
    assert_accurate(out.cpu(), plain(*device, scale, mask.to(DEVICE)).cpu(), truth)
    wide = [None if x is None else x.float() for x in args]
    assert_accurate(lse.cpu(), dense(*wide, scale, mask.float())[1], truth_lse)


@here
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_forward(shape, dtype):
    check_forward(inputs(shape, dtype))


@here
@each_dtype
@pytest.mark.parametrize(("rows", "num_frames", "radius", "reference"), BANDS)
def test_local_forward(rows, num_frames, radius, reference, dtype):
    check_forward(inputs((1, rows, rows, reference, 2, 16), dtype), num_frames, radius)


@here
def test_tile_sizes_and_strength_do_not_change_the_meaning():
    args = inputs((1, 30, 30, 20, 1, 16))
    for config in (Config(16, 16, 4, 1), Config(16, 64, 4, 1), Config(64, 16, 4, 1)):
        check_forward(args, 2, 0, 0.25, config)
    check_forward(args, 1, 0, 3.0)


@here
@each_dtype
def test_scores_far_apart(dtype):
    """A maximum that keeps rising, and rows whose scores are all so low that a zero key would outweigh them."""
    q, k, v, ref_k, ref_v = inputs((1, 33, 70, 50, 1, 16), dtype)
    q.copy_(torch.ones(q.shape))
    k.copy_(torch.linspace(-8, 2, 70)[None, :, None, None].expand(k.shape))
    ref_k.copy_(torch.linspace(2, 9, 50)[None, :, None, None].expand(ref_k.shape))
    check_forward((q, k, v, ref_k, ref_v), scale=1.0)
    k.copy_(torch.full(k.shape, -20.0) + torch.rand(k.shape) / 16)
    check_backward((q, k, v, None, None), scale=1.0)


@here
def test_result_depends_on_its_own_row_only():
    args = inputs((2, 50, 40, 35, 2, 32))
    device = there(*args)
    out, lse = attention(*device, 1, 0, 0.2)
    again, again_lse = attention(*device, 1, 0, 0.2)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    alone, _ = attention(*[x[1:, :, 1:] for x in device], 1, 0, 0.2)
    assert torch.equal(out[1:, :, 1:], alone)
    device[0][0, 3] = float("nan")
    poisoned, _ = attention(*device, 1, 0, 0.2)
    assert poisoned[0, 3].isnan().all()
    poisoned[0, 3] = out[0, 3]
    assert torch.equal(out, poisoned)


@here
def test_missing_segments_are_one_thing():
    q, k, v, ref_k, ref_v = there(*inputs((1, 20, 12, 9, 2, 16)))
    without, lse = attention(q, k, v, None, None, 1, 0, 0.2)
    assert torch.equal(attention(q, k, v, ref_k[:, :0], ref_v[:, :0], 1, 0, 0.2)[0], without)
    assert torch.equal(attention(q, k, v, ref_k, ref_v, 1, 0, 0.2, -math.inf)[0], without)
    assert torch.equal(attention(q, None, None, k, v, 1, 0, 0.2)[0], without)
    assert attention(q[:, :0], k, v, None, None, 1, 0, 0.2)[0].shape == (1, 0, 2, 16)
    grads = attention_backward(without, None, q, k, v, ref_k, ref_v, without, lse, 1, 0, 0.2, -math.inf)
    assert not grads[3].any()
    assert not grads[4].any()
    empty = attention_backward(without, None, q, k, v, ref_k[:, :0], ref_v[:, :0], without, lse, 1, 0, 0.2)
    assert empty[3].shape == (1, 0, 2, 16)
    for a, b in zip(grads[:3], empty[:3]):
        assert torch.equal(a, b)


def by_lse(q, k, v, ref_k, ref_v, scale, mask) -> tuple[Tensor, Tensor]:
    """torch's own steps with weights made from the rounded LSE, which is all that a backward gets to see."""
    keys, values = (torch.cat([x for x in pair if x is not None], 1) for pair in ((k, ref_k), (v, ref_v)))
    scores = torch.einsum("blnd,bsnd->bnls", q, keys) * scale + mask
    lse = scores.logsumexp(-1)
    return torch.einsum("bnls,bsnd->blnd", (scores - lse[..., None]).exp(), values), lse


def check_backward(args, num_frames=1, radius=0, strength=1.0, with_lse=False, scale=0.2, config=None):
    mask = mask_of(args[0], args[1], args[3], num_frames, radius, strength)
    grad = torch.randn(args[0].shape).to(args[0].dtype)
    grad_lse = torch.randn(args[0].shape[0], args[0].shape[2], args[0].shape[1]) if with_lse else None

    def by_autograd(call, tensors):
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
        outputs = call(*leaves)
        pairs = zip(outputs, (grad, grad_lse)) if with_lse else [(outputs[0], grad)]
        total = sum((o * g.to(o)).sum() for o, g in pairs)
        return iter(torch.autograd.grad(total, [x for x in leaves if x is not None]))

    truth = by_autograd(lambda *a: dense(*a, scale, mask), doubled(*args))
    if with_lse:
        by_torch = by_autograd(lambda *a: by_lse(*a, scale, mask.to(a[0].dtype)), args)
    else:
        by_torch = by_autograd(lambda *a: [plain(*a, scale, mask.to(a[0].device))], there(*args))
    device = there(*args)
    bias = math.log2(strength)
    out, lse = attention(*device, num_frames, radius, scale, bias)
    call = (*there(grad, grad_lse), *device, out, lse, num_frames, radius, scale, bias, config)
    got, again = attention_backward(*call), attention_backward(*call)
    for x, a, b in zip(args, got, again):
        assert (a is None) == (x is None)
        if a is not None:
            assert torch.equal(a, b)
            assert_accurate(a.cpu(), next(by_torch).cpu(), next(truth))


@here
@each_dtype
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_sparse_backward(shape, dtype):
    check_backward(inputs(shape, dtype))


@here
@each_dtype
@pytest.mark.parametrize(("rows", "num_frames", "radius", "reference"), BANDS[1:])
def test_local_backward(rows, num_frames, radius, reference, dtype):
    check_backward(inputs((1, rows, rows, reference, 1, 16), dtype), num_frames, radius)


@here
def test_backward_through_lse_and_strength():
    args = inputs((2, 34, 34, 20, 1, 8))
    check_backward(args, 2, 0, 0.3, with_lse=True)
    check_backward(args, 1, 0, 2.0, with_lse=True, config=Config(16, 32, 4, 1))


# --- norm, conv, flow ------------------------------------------------------------------------------------------------


@here
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 10), (1, 5, 4, 64)])
def test_qk_norm_rope(shape, dtype):
    _, rows, heads, dim = shape
    angle = torch.rand(rows, dim // 2) * 6
    args = (strided(*shape, dtype=dtype), torch.randn(heads * dim), angle.cos(), angle.sin())
    got = norm.qk_norm_rope(*there(*args), 1e-6)
    truth = norm_rope(*doubled(*args))
    assert_accurate(got.cpu(), norm_rope(*args).to(dtype), truth)
    cache = torch.full((2, shape[0], rows + 3, heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    part = cache[1, :, 2 : rows + 2]
    assert norm.qk_norm_rope(*there(*args), 1e-6, out=part) is part
    assert torch.equal(part, got)
    assert cache.isnan().sum() == cache.numel() - part.numel()


@here
@each_dtype
@pytest.mark.parametrize("row_dtype", [torch.float32, "same"])
@pytest.mark.parametrize("indexed", [False, True])
def test_modulation_and_gate(indexed, row_dtype, dtype):
    batch, rows, frames, width = 2, 12, 4, 21
    x, y = (strided(batch, rows, width, dtype=dtype) for _ in range(2))
    shift, scale = (strided(batch, frames, width, dtype=dtype if row_dtype == "same" else row_dtype) for _ in range(2))
    index = torch.randint(frames, (rows,)) if indexed else None
    got = norm.layernorm_modulate(*there(x, shift, scale, index), 1e-6)
    truth = modulate(*doubled(x, shift, scale), index)
    assert_accurate(got.cpu(), modulate(x, shift, scale, index).to(dtype), truth)
    got = norm.gate_residual(*there(x, y, scale, index))
    assert_accurate(got.cpu(), gated(x, y, scale, index).to(dtype), gated(*doubled(x, y, scale), index))


@here
def test_a_frame_that_does_not_exist_is_nan_and_nothing_else():
    x, rows, index = torch.randn(1, 4, 8), torch.randn(1, 2, 8), torch.tensor([0, 2, -1, 1])
    for got in (
        norm.gate_residual(*there(x, x, rows, index)),
        norm.layernorm_modulate(*there(x, rows, rows, index), 1e-6),
    ):
        assert got.isnan().all(-1).tolist() == [[False, True, True, False]]


@here
@each_dtype
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("kt", [2, 3, 4])
def test_the_past_of_a_convolution(kt, frames, dtype):
    x = make(2, frames, 3, 35, dtype).unflatten(-1, (5, 7)).transpose(1, 2)
    state = torch.randn(2, 3, kt - 1, 5, 7).to(dtype)
    for before in (None, state):
        past, new_state = back(*conv.with_past(*there(x, before), kt))
        want = torch.cat([torch.zeros_like(state) if before is None else before, x], 2)
        assert torch.equal(past, want)
        assert torch.equal(new_state, want[:, :, frames:])


@here
@each_dtype
def test_flow_step(dtype):
    z, velocity = torch.randn(3, 700).to(dtype), torch.randn(3, 700)
    got = flow.flow_step(*there(z, velocity), -0.25)
    assert_accurate(got.cpu(), (z.float() - 0.25 * velocity).to(dtype), z.double() - 0.25 * velocity.double())


# --- who is chosen ---------------------------------------------------------------------------------------------------


def on_gpu(dtype=torch.float32, shape=(1, 4, 2, 8)):
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape, stride=lambda i: 1)


def test_reasons(monkeypatch):
    x = torch.zeros(1, 4, 2, 8)
    assert _triton.refuses_attention(x) == "q is on cpu"
    assert ops.explain("gate_residual", x[0], x[0], x[0], None)["triton"] == "x is on cpu"
    assert _triton.refuses_attention(on_gpu(shape=(1, 4, 2, 256))) == "D=256 is above 128"
    assert "dtype float64 is none of" in _triton.refuses("x", on_gpu(torch.float64))
    monkeypatch.setattr(_triton, "_arch", lambda device: (7, 5))
    assert _triton.refuses("x", on_gpu()) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(_triton, "_arch", lambda device: (9, 0))
    assert _triton.refuses("x", on_gpu()) is None
    monkeypatch.setattr(_triton, "_installed", lambda: False)
    assert _triton.refuses("x", on_gpu()) == "triton is not installed"
    assert _triton.refuses_rows(x=x[0, 0], y=None) is None
    reason = "y is not contiguous in its last dimension (strides [1, 8])"
    assert _triton.refuses_rows(x=x[0, 0], y=x[0, 0].t()) == reason


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_ops_on_a_gpu_take_triton():
    args = [x.requires_grad_() for x in there(*inputs((1, 40, 40, 20, 2, 64), torch.bfloat16))]
    with ops.force("local_temporal_attention", "triton"):
        out = ops.local_temporal_attention(*args, num_frames=4, radius=1)
    want, _ = attention(*[x.detach() for x in args], 4, 1, 0.125)
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.float().sum(), args)
    assert all(g.isfinite().all() for g in grads)
