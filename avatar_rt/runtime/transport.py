"""How ranks exchange tensors: a small interface, torch.distributed under it by default, every byte counted.

Rows are the first dimension of every tensor here, and counts may differ from rank to rank. An operation starts at once
and returns a ``Pending``; what is computed before ``wait()`` overlaps it. Symmetric memory or NVSHMEM fits under the
same five operations: nothing above this file knows how bytes travel. NCCL has not been run yet, gloo has.
"""

from __future__ import annotations

import datetime
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rt.errors import InputError, RankError

# A rank that computes may be this late at a collective before the others give it up. A dead process is noticed at once
# on one machine (its connections close) and by its missing heartbeat elsewhere.
COLLECTIVE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective, in order; ``handle`` is the transport's own."""

    ranks: tuple[int, ...]
    handle: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)


class Pending:
    """An operation under way: ``out`` holds its result once ``wait()`` has returned."""

    def __init__(self, out: Tensor, finish: Callable[[], Any] = lambda: None, held: Any = None) -> None:
        self.out, self._finish, self._held = out, finish, held  # inputs stay alive until the wait

    def wait(self) -> Tensor:
        """The result; the current stream (or thread) may use it from here on. Raises RankError."""
        self._finish()
        self._held = None
        return self.out


class Transport(ABC):
    """What sequence parallelism needs of a network.

    ``sent`` counts the bytes that this rank sends to other ranks, and ``calls`` the operations, by kind: all_to_all,
    all_gather, exchange, broadcast.
    """

    rank: int
    world: int
    everybody: Group

    def __init__(self) -> None:
        self.failed = False  # a RankError has been raised here: the run is ending
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @abstractmethod
    def group(self, partition: Sequence[Sequence[int]]) -> Group:
        """The member of a partition of all ranks that holds this one. Collective: every process calls it alike."""

    @abstractmethod
    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Pending:
        """Rows of contiguous ``x``, ``send[i]`` of them to the i-th member, for ``receive[i]`` rows of the i-th."""

    @abstractmethod
    def all_gather(self, x: Tensor, rows: Sequence[int], group: Group) -> Pending:
        """The members' rows, one after another; the i-th brings ``rows[i]``."""

    @abstractmethod
    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Pending:
        """Point to point: contiguous tensors to ranks, buffers filled from ranks, all at once."""

    @abstractmethod
    def broadcast(self, x: Tensor, root: int) -> Pending:
        """Contiguous ``x`` of ``root`` into everybody's ``x``."""

    def abort(self) -> None:  # noqa: B027  (a transport without it waits for its own timeout)
        """Makes what waits for a lost rank give up. From any thread."""

    def take(self) -> Counter[str]:
        """Bytes sent since the last call, by kind."""
        taken, self.sent = self.sent, Counter()
        return taken

    def _count(self, kind: str, amount: int) -> None:
        self.sent[kind] += amount
        self.calls[kind] += 1


class TorchTransport(Transport):
    """torch.distributed: NCCL between GPUs, gloo between CPUs. ``join`` makes the process group it needs.

    Args:
        store: Where the ranks met; None when the caller made the process group.
        size: Runs of so many neighbouring processes are a world of their own each, whose ranks count from 0: in
            training, those that share a clip. None: all processes are one.
        timeout_s: How late a rank may be at a collective of ``group``'s.

    Raises: InputError when the number of processes is no multiple of ``size``. Every process makes it alike.
    """

    def __init__(
        self, store: dist.Store | None = None, *, size: int | None = None, timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        super().__init__()
        self.processes, self.store, self.timeout = dist.get_world_size(), store, datetime.timedelta(seconds=timeout_s)
        self.world = size or self.processes
        if self.processes % self.world:
            raise InputError(f"ranks: expected a multiple of {self.world} processes, got {self.processes}")
        self.rank = dist.get_rank() % self.world
        self.first = dist.get_rank() - self.rank  # the process that is rank 0 of this world
        self.everybody = self.group([range(self.world)])

    def group(self, partition: Sequence[Sequence[int]]) -> Group:
        mine = None
        for first in range(0, self.processes, self.world):
            for ranks in partition:
                some = 1 < len(ranks) < self.processes
                handle = dist.new_group([first + r for r in ranks], timeout=self.timeout) if some else None
                if first == self.first and self.rank in ranks:
                    mine = Group(tuple(ranks), handle)
        assert mine is not None, "every rank is in a partition"
        return mine

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Pending:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        me = group.ranks.index(self.rank)
        self._count("all_to_all", (x.shape[0] - send[me]) * _row_bytes(x))
        return self._start(
            "all_to_all",
            out,
            lambda: dist.all_to_all_single(out, x, list(receive), list(send), group=group.handle, async_op=True),
            x,
        )

    def all_gather(self, x: Tensor, rows: Sequence[int], group: Group) -> Pending:
        longest = max(rows)
        mine = x.new_zeros((longest, *x.shape[1:]))  # collectives want equal parts; the padding is dropped on arrival
        mine[: x.shape[0]] = x
        parts = x.new_empty((group.size * longest, *x.shape[1:]))
        self._count("all_gather", (group.size - 1) * longest * _row_bytes(x))
        pending = self._start(
            "all_gather", parts, lambda: _all_gather(parts, mine, group=group.handle, async_op=True), mine
        )
        if min(rows) == longest:
            return pending
        out = x.new_empty((sum(rows), *x.shape[1:]))

        def finish() -> None:
            pending.wait()
            cut = [part[:n] for part, n in zip(parts.split(longest), rows, strict=True)]
            torch.cat(cut, out=out)

        return Pending(out, finish)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Pending:
        nothing = torch.empty(0)
        if not sends and not receives:
            return Pending(nothing)
        ops = [dist.P2POp(dist.isend, x, self.first + peer) for x, peer in sends]
        ops += [dist.P2POp(dist.irecv, x, self.first + peer) for x, peer in receives]
        self._count("exchange", sum(x.numel() * x.element_size() for x, _ in sends))
        return self._start("exchange", nothing, lambda: dist.batch_isend_irecv(ops), (sends, receives))

    def broadcast(self, x: Tensor, root: int) -> Pending:
        self._count("broadcast", x.numel() * x.element_size() * (self.world - 1) if self.rank == root else 0)
        group = self.everybody.handle
        return self._start("broadcast", x, lambda: dist.broadcast(x, self.first + root, group, async_op=True), x)

    def abort(self) -> None:
        stop = getattr(dist.group.WORLD, "abort", None)
        if stop is not None:
            stop()

    def _start(self, kind: str, out: Tensor, start: Callable[[], Any], held: Any) -> Pending:
        def finish() -> None:
            with _Watched(kind, self):
                for work in works:
                    work.wait()

        with _Watched(kind, self):
            started = start()
            works = started if isinstance(started, list) else [started]
        return Pending(out, finish, held)


class _Watched:
    """Turns what torch.distributed raises when a peer is gone into one sentence."""

    def __init__(self, kind: str, transport: Transport) -> None:
        self.kind, self.transport = kind, transport

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RankError):
            self.transport.failed = True
            reason = " ".join(str(error).split("] ", 1)[-1].split()).split(". ")[0][:160]
            raise RankError(
                f"rank {self.transport.rank}: another rank of this run ended or stopped answering "
                f"(noticed in {self.kind}: {reason})"
            ) from error


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def local_device(kind: str) -> torch.device:
    """The device of this rank: cuda is the GPU of its number on this machine."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
    torch.cuda.set_device(device)
    return device


def join(device: torch.device, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> TorchTransport:
    """Joins the run that torchrun started: nccl for CUDA, gloo for CPUs.

    Raises: InputError when this process was not started by torchrun (or something that sets what it sets).
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://"))
    except ValueError:
        raise InputError(
            "ranks: expected to be started as torchrun --nproc-per-node N -m avatar_rt ..., where N is the ulysses "
            "degree times the ring degree; this process is alone"
        ) from None
    meeting = dist.PrefixStore("avatar_rt", store)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=timeout
    )
    return TorchTransport(meeting)


def leave(orderly: bool) -> None:
    """Ends the membership. ``orderly``: every rank comes here, and waits for the others' last messages."""
    if orderly:
        dist.barrier()
    dist.destroy_process_group()


# torch 2.13 renames it and warns of the old name; 2.11 knows only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * math.prod(x.shape[1:])
