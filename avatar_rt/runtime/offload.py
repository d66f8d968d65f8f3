"""Blocks that lie on the host and are copied to the device one ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor

B = TypeVar("B")


class Copies(Protocol):
    """How a block gets to the device: started early, waited for late."""

    def start(self, block: Any) -> Any:
        """Begins to copy a block; returns what ``finish`` wants."""
        ...

    def finish(self, copy: Any) -> Any:
        """The block on the device, for the work that is queued next."""
        ...


class HostCopies:
    """On a CPU there is nothing to copy."""

    def start(self, block: Any) -> Any:
        return block

    def finish(self, copy: Any) -> Any:
        return copy


class _Pending(NamedTuple):
    block: Any
    ready: Any


class CudaCopies:
    """Copies on a stream of its own, from pinned memory. Written for CUDA and not yet run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, block: Any) -> _Pending:
        with torch.cuda.stream(self.stream):
            copied = each_tensor(block, lambda x: x.to(self.device, non_blocking=True))
            return _Pending(copied, self.stream.record_event())

    def finish(self, copy: _Pending) -> Any:
        now = torch.cuda.current_stream(self.device)
        now.wait_event(copy.ready)

        # The allocator must not give the memory away while the work queued on this stream still reads it.
        def used_here(x: Tensor) -> Tensor:
            x.record_stream(now)
            return x

        return each_tensor(copy.block, used_here)


class Prefetched(Sequence[B]):
    """A sequence of blocks that hands out block i on the device while block i + 1 is on its way.

    After the last comes the first, for the next pass. At most two blocks are on the device for it. A block asked for
    twice in a row, by two passes that go through the blocks side by side, is copied once.
    """

    def __init__(self, blocks: Sequence[B], copies: Copies) -> None:
        self._blocks, self._copies = blocks, copies
        self._coming: dict[int, Any] = {}
        self._last: tuple[int, B] | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> B: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[B]: ...
    def __getitem__(self, index: int | slice) -> B | Sequence[B]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = index % len(self)
        if self._last is not None and self._last[0] == i:
            return self._last[1]
        self._last = None  # frees its memory before the next but one needs some
        copy = self._coming.pop(i) if i in self._coming else self._copies.start(self._blocks[i])
        self._coming = {}  # one that was not asked for after all
        if len(self) > 1:
            following = (i + 1) % len(self)
            self._coming[following] = self._copies.start(self._blocks[following])
        self._last = i, self._copies.finish(copy)
        return self._last[1]


def each_tensor(block: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block, such as a named tuple of tensors and numbers, with every tensor changed."""
    if isinstance(block, Tensor):
        return change(block)
    if isinstance(block, tuple):
        parts = [each_tensor(x, change) for x in block]
        return type(block)(*parts) if hasattr(block, "_fields") else tuple(parts)
    return block


def to_host(block: Any) -> Any:
    """A block in host memory, pinned where a GPU is there to copy from it."""
    pin = torch.cuda.is_available()
    return each_tensor(block, lambda x: x.cpu().pin_memory() if pin else x.cpu())


def copies_for(device: torch.device) -> Copies:
    """What copies to a device."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()
