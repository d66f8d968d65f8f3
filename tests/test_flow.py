"""The flow solver's step."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_accurate
from torch.library import opcheck

from avatar_rt.errors import InputError
from avatar_rt.ops import cost, explain, flow_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 16, 5, 9, 7)])
def test_accuracy(shape, dtype):
    z, velocity = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    truth = z.double() + (0.3 - 0.8) * velocity.double()
    assert_accurate(flow_step(z, velocity, 0.8, 0.3), z + (0.3 - 0.8) * velocity, truth)


def test_a_straight_path_is_followed_exactly():
    """From noise to data in any cut: z_t = (1 - t) x + t noise has the constant velocity noise - x."""
    x, noise = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    z = noise
    for t, t_next in ((1.0, 0.6), (0.6, 0.1), (0.1, 0.0)):
        z = flow_step(z, noise - x, t, t_next)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-14)


def test_strided_inputs_and_mixed_dtypes():
    z = torch.full((4, 6), float("nan"))[:3, 1:5].copy_(torch.randn(3, 4)).t()
    velocity = torch.randn(4, 3, dtype=torch.bfloat16)
    out = flow_step(z, velocity, 0.5, 0.25)
    assert out.dtype == torch.float32
    assert torch.equal(out, z - 0.25 * velocity.float())


def test_gradients_and_opcheck():
    z, velocity = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: flow_step(a, b, 0.9, 0.4), (z, velocity))
    opcheck(torch.ops.avatar_rt.flow_step, (z, velocity, 0.9, 0.4))


def test_input_errors():
    z = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"velocity: expected shape \[2, 3\] like z, got \[3, 2\]"):
        flow_step(z, z.t(), 0.5, 0.4)
    with pytest.raises(InputError, match=r"t_next: expected a time in 0\.\.1, got -0\.1"):
        flow_step(z, z, 0.5, -0.1)
    with pytest.raises(InputError, match="z: expected a floating dtype, got int64"):
        flow_step(z.long(), z, 0.5, 0.4)


def test_cost_and_refusals():
    z = torch.zeros(2, 3)
    assert cost("flow_step", z, z, 1.0, 0.5) == (12, 72)
    assert explain("flow_step", z, z, 1.0, 0.5) == {"cuda": "z is on cpu", "triton": "z is on cpu", "reference": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel(dtype):
    z, velocity = (torch.randn(5, 1001, dtype=dtype, device="cuda") for _ in range(2))
    truth = z.double() - 0.25 * velocity.double()
    if explain("flow_step", z, velocity, 0.5, 0.25)["cuda"] is not None:
        pytest.skip("the extension was built without CUDA")
    assert_accurate(flow_step(z, velocity, 0.5, 0.25), z - 0.25 * velocity, truth)
