"""How kernels are cut up on this machine. No result depends on it beyond rounding; a tuning file chooses it."""

from __future__ import annotations

from avatar_rt.ops import _load, _triton


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
