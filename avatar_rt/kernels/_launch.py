"""One kernel launch as a value: what runs, over which grid, with which arguments; to be run, printed or compiled."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch shape of one kernel on one kind of GPU.

    Attributes:
        rows: Query rows per tile.
        keys: Key rows per tile.
        num_warps, num_stages: As Triton takes them.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that its launch needs.

    Attributes:
        kernel: A ``triton.jit`` function.
        grid: Programs along x, y, z; none is launched when one of them is 0.
        args: All parameters of the kernel by name, compile-time constants included.
        num_warps, num_stages: As Triton takes them.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Launch on torch's current stream of the tensors' device."""
        if 0 in self.grid:
            return
        tensor = next(a for a in self.args.values() if isinstance(a, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.args, num_warps=self.num_warps, num_stages=self.num_stages)


def arch_of(x: Tensor) -> int:
    """Compute capability of the GPU that holds ``x``, such as 90; 0 for the interpreter's CPU tensors."""
    return 0 if x.device.type != "cuda" else _arch(x.device)


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is ``size`` or more, and at least ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def strides(name: str, x: Tensor, letters: str) -> dict[str, int]:
    """{name_letter: stride} for the leading dimensions of ``x``, in elements."""
    return {f"{name}_{letter}": x.stride(i) for i, letter in enumerate(letters)}
