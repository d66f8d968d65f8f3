"""What every test gets: the repository's root, a fixed seed, and real recordings where a machine has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """No test depends on those before it: the same seed at the start, torch's settings restored at the end."""
    torch.manual_seed(0)
    threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder AVATAR_RT_DATA names, with ``clips`` and ``speech`` of real people; never part of the repository."""
    named = os.environ.get("AVATAR_RT_DATA")
    if not named or not (Path(named) / "clips").is_dir():
        pytest.skip("no real recordings: AVATAR_RT_DATA names no folder with clips and speech")
    return Path(named)
