"""Named ranges for profilers: the stages of a request as a timeline shows them, nothing when nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from avatar_rt.errors import UnsupportedError

_mark: Callable[[str], AbstractContextManager[Any]] | None = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A range around a block or, as a decorator, around every call of a function.

    NVTX within ``nvtx_ranges()``, torch's own range while torch's profiler runs, both when both look, else nothing at
    all. A block may not contain a ``yield``: ranges of one thread must nest.
    """
    marked = _mark
    if marked is None and not torch.autograd._profiler_enabled():
        yield
        return
    with torch.profiler.record_function(name):
        if marked is None:
            yield
        else:
            with marked(name):
                yield


@contextmanager
def watched_by(mark: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within the block, the stages of every thread are ranges of ``mark``, which makes a context of a name."""
    global _mark
    before, _mark = _mark, mark
    try:
        yield
    finally:
        _mark = before


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Within the block, the stages of every thread are NVTX ranges too; for use under Nsight Systems.

    Raises: UnsupportedError when the nvtx package is not there.
    """
    try:
        from nvtx import annotate
    except ImportError:
        raise UnsupportedError("nvtx_ranges: the nvtx package is not installed: pip install nvtx") from None
    with watched_by(lambda name: annotate(name, domain="avatar_rt")):
        yield
