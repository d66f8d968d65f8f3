"""How kernels are cut up on this machine. No result depends on it beyond rounding; a tuning file chooses it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from avatar_rt.ops import _load, _triton


@cache
def _set_own_threads() -> Callable[[int], object] | None:
    """Sets how many threads OpenMP computes with for the calling thread, and for no other; None where torch's threads
    are not OpenMP's. ``torch.set_num_threads`` would set it for every thread that begins meanwhile as well."""
    try:
        found = ctypes.CDLL(None).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    before = torch.get_num_threads()
    found(before + 1)
    is_torchs = torch.get_num_threads() == before + 1
    found(before)
    return found if is_torchs else None


@contextmanager
def torch_alone() -> Iterator[int]:
    """Within the block, torch computes on the calling thread alone; gives the number of threads it had.

    What stands between recorded kernels is small, and at the end of each of its parts torch's threads spin for one
    another: with a core busy otherwise, each such wait is a time slice. The recorded kernels' own threads do not wait
    for one that has not begun. Other threads keep the number they have.
    """
    before, set_threads = torch.get_num_threads(), _set_own_threads()
    if before > 1 and set_threads is not None:
        set_threads(1)
    try:
        yield before
    finally:
        if before > 1 and set_threads is not None:
            set_threads(before)


def set_cpu_schedule(linear_rows: int, norm_rows: int, spins: int) -> None:
    """Of recorded kernels, for the whole process: rows of a task of products (a multiple of 24) and of norms, and how
    often an idle thread looks for work before it sleeps. Without the native core there is nothing to set.

    Raises: InputError on numbers outside of these.
    """
    module, _ = _load.native()
    if module is not None:
        module.set_schedule(linear_rows, norm_rows, spins)


def set_gpu_tiles(tiles: tuple[int, ...]) -> None:
    """Triton's attention tiles for the whole process: rows, keys, warps, stages; empty takes the table's."""
    _triton.attention_tiles = tiles
