"""One step of the flow solver: z + dt * velocity in fp32, one read of each and one write. Bound by memory bandwidth."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from avatar_rt.kernels._launch import Launch

_BLOCK = 1024


@triton.jit
def flow_step_kernel(z, velocity, out, size, dt, BLOCK: tl.constexpr):
    """z, velocity, out: [size]. Grid: (tiles, 1, 1)."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    moved = tl.load(z + at, mask=inside).to(tl.float32) + dt * tl.load(velocity + at, mask=inside).to(tl.float32)
    tl.store(out + at, moved.to(out.dtype.element_ty), mask=inside)


def flow_step_launch(z: Tensor, velocity: Tensor, dt: float, out: Tensor) -> Launch:
    """Shapes as in ``flow_step``."""
    args: dict[str, Any] = {"z": z, "velocity": velocity, "out": out, "size": z.numel(), "dt": dt, "BLOCK": _BLOCK}
    return Launch(flow_step_kernel, (triton.cdiv(z.numel(), _BLOCK), 1, 1), args)


def flow_step(z: Tensor, velocity: Tensor, dt: float) -> Tensor:
    """``z + dt * velocity`` of two contiguous tensors of one shape, in the dtype of ``z``."""
    out = torch.empty_like(z)
    flow_step_launch(z, velocity, dt, out).run()
    return out
