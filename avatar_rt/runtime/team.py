"""Rank 0 leads a run over several ranks: what it calls by name, every rank runs, on the same tensors.

So the pipeline, its files and its progress live on rank 0 alone, and the other ranks hold weights and follow. Names
and shapes go through the store that torchrun brings; tensors go as one broadcast. Each rank has a heartbeat: one that
ends or hangs is noticed by the leader (and the leader's end by all) even while nothing is being exchanged.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from avatar_rt.errors import AvatarError, RankError
from avatar_rt.runtime.transport import Transport

BEAT_S = 1.0
LOST_AFTER_S = 10.0
_ALIGNMENT = 16  # bytes: every tensor starts where any dtype may
_KEPT = 64  # calls whose messages stay in the store


class Heartbeat:
    """A thread that says that this rank lives, and notices when one it watches does not."""

    def __init__(self, store: Store, rank: int, watched: list[int], lost: Callable[[], None]) -> None:
        clone = getattr(store, "clone", None)  # a connection of its own: another thread uses the other
        self.store = clone() if clone is not None else store
        self.rank, self.watched, self._lost = rank, watched, lost
        self.reason: str | None = None
        self._stopped = threading.Event()
        self.store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: RankError when a watched rank is gone."""
        if self.reason is not None:
            raise RankError(self.reason)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=2 * BEAT_S)

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        try:
            while not self._stopped.wait(BEAT_S):
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))
                for other in self.watched:
                    if not self.store.check([f"beat/{other}"]):
                        continue  # not there yet
                    beat, now = self.store.get(f"beat/{other}"), time.monotonic()
                    if beat != seen.get(other, (b"", 0.0))[0]:
                        seen[other] = (beat, now)
                    elif now - seen[other][1] > LOST_AFTER_S and not self._stopped.is_set():
                        self._give_up(f"rank {other} of this run has not answered for {LOST_AFTER_S:.0f} s")
                        return
        except RuntimeError as e:
            if not self._stopped.is_set():
                self._give_up(f"the store of this run is gone ({' '.join(str(e).split())[:100]})")

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._lost()


class Team:
    """The ranks of a run. Rank 0 calls; the others ``follow`` until it stops. Functions are registered on all alike."""

    def __init__(self, transport: Transport, store: Store, device: torch.device) -> None:
        self.transport, self.store, self.device = transport, store, device
        self.leads = transport.rank == 0
        others = [r for r in range(transport.world) if r] if self.leads else [0]
        self.beat = Heartbeat(store, transport.rank, others, transport.abort)
        self._functions: dict[str, Callable[..., Any]] = {}
        self.lock = threading.RLock()  # one call at a time; hold it around what a call reads
        self._count = 0

    def register(self, name: str, function: Callable[..., Any]) -> None:
        """Makes a function callable by name; on every rank."""
        self._functions[name] = function

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a registered function on all ranks (leader only) and returns what it returned here.

        Arguments are tensors, plain values, and lists, tuples and dictionaries of them. Raises RankError.
        """
        assert self.leads, "only rank 0 calls"
        with self.lock:
            try:
                self.beat.check()
                tensors: list[Tensor] = []
                message = (name, _strip((args, kwargs), tensors), [(list(t.shape), t.dtype) for t in tensors])
                self.store.set(f"call/{self._count}", pickle.dumps(message))  # type: ignore[arg-type]
                if self._count >= _KEPT:
                    self.store.delete_key(f"call/{self._count - _KEPT}")
                self._count += 1
                if tensors:
                    self.transport.broadcast(_pack(tensors, self.device), 0).wait()
                return self._functions[name](*args, **kwargs)
            except RankError as e:
                raise RankError(self._why() or self.beat.reason or str(e)) from e

    def follow(self) -> bool:
        """Runs what the leader calls, until it stops: whether in order. Raises RankError when the leader is gone."""
        while True:
            name, stripped, shapes = pickle.loads(self._next())
            if not name:
                return bool(stripped)
            try:
                tensors: list[Tensor] = []
                if shapes:
                    buffer = torch.empty(_packed_bytes(shapes), dtype=torch.uint8, device=self.device)
                    tensors = _unpack(self.transport.broadcast(buffer, 0).wait(), shapes)
                args, kwargs = _restore(stripped, tensors)
                with torch.inference_mode():
                    self._functions[name](*args, **kwargs)
            except RankError:
                raise
            except AvatarError:
                continue  # what was called is wrong: the leader has the same error and says so
            except BaseException as e:
                self.store.set(f"failed/{self.transport.rank}", f"{type(e).__name__}: {e}"[:500])
                raise

    def stop(self, orderly: bool) -> None:
        """Ends the run: the leader lets the followers go, each ends its heartbeat."""
        if self.leads:
            self.store.set(f"call/{self._count}", pickle.dumps(("", orderly, [])))  # type: ignore[arg-type]
        self.beat.stop()

    def _next(self) -> bytes:
        key, started = f"call/{self._count}", time.monotonic()
        while not self.store.check([key]):
            self.beat.check()
            time.sleep(0.0005 if time.monotonic() - started < 1 else 0.01)
        self._count += 1
        return self.store.get(key)

    def _why(self) -> str | None:
        """What a follower said before it ended."""
        for rank in range(1, self.transport.world):
            try:
                if self.store.check([f"failed/{rank}"]):
                    return f"rank {rank} failed: {self.store.get(f'failed/{rank}').decode()}"
            except RuntimeError:
                return None  # the store went with it
        return None


class _Place:
    """Stands for the n-th tensor of a message."""

    def __init__(self, n: int) -> None:
        self.n = n


def _strip(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {k: _strip(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(v, tensors) for v in value]
    return value


def _restore(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.n]
    if isinstance(value, dict):
        return {k: _restore(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _packed_bytes(shapes: list[tuple[list[int], torch.dtype]]) -> int:
    return sum(_padded(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes)


def _pack(tensors: list[Tensor], device: torch.device) -> Tensor:
    parts = []
    for t in tensors:
        part = t.detach().to(device).contiguous().view(-1).view(torch.uint8)
        parts.append(torch.nn.functional.pad(part, (0, _padded(part.numel()) - part.numel())))
    return torch.cat(parts)


def _unpack(buffer: Tensor, shapes: list[tuple[list[int], torch.dtype]]) -> list[Tensor]:
    tensors, at = [], 0
    for shape, dtype in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(buffer[at : at + size].view(dtype).view(shape))
        at += _padded(size)
    return tensors
