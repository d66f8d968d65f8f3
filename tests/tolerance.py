"""The house's accuracy policy: an op may err twice as much as plain torch in the same dtype, plus one ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of ``dtype`` at the largest magnitude in ``truth``."""
    return torch.finfo(dtype).eps * truth.abs().max().item()


def worst(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite when a NaN or infinity stands where the truth is finite."""
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - truth).abs()
    return float("inf") if difference.isnan().any() else difference.max().item()


def typical(got: Tensor, truth: Tensor) -> float:
    """Root mean square of the differences, in fp64: what does not hang on one lucky or unlucky element."""
    return (got.double() - truth).square().mean().sqrt().item() if got.numel() else 0.0


def assert_accurate(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """``got`` and ``plain`` (torch's own composition) are in one dtype, ``truth`` is fp64 from the same inputs."""
    assert truth.dtype == torch.float64
    assert got.dtype == plain.dtype, f"dtype: expected {plain.dtype}, got {got.dtype}"
    assert got.shape == truth.shape, f"shape: expected {list(truth.shape)}, got {list(got.shape)}"
    if got.numel() == 0:
        return
    limit = 2 * worst(plain, truth) + ulp(truth, got.dtype)
    error = worst(got, truth)
    assert error <= limit, f"error {error:.3e} is above {limit:.3e} (plain torch errs {worst(plain, truth):.3e})"


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies in fp64."""
    return [None if x is None else x.double() for x in tensors]
