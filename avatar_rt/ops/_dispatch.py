"""Who runs an op: a table of implementations per op, each with a predicate that both chooses and explains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import _check


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: What ``force`` and ``explain`` call it: ``reference``, ``cpu``, ``cuda``, ``triton``.
        refuses: Takes the op's arguments; None when it can run them, else the reason in a few words.
        run: Takes the same arguments and computes the op.
        by_choice: Whether it may be taken without ``force``. A reference that is far slower than the
            honest implementation is not: a machine must never end up on it unnoticed.
    """

    name: str
    refuses: Callable[..., str | None]
    run: Callable[..., Any]
    by_choice: bool = True


_TABLE: dict[str, tuple[Implementation, ...]] = {}
_COSTS: dict[str, Callable[..., tuple[int, int]]] = {}
_FORCED: ContextVar[MappingProxyType[str, str]] = ContextVar("forced", default=MappingProxyType({}))


def register(op: str, cost: Callable[..., tuple[int, int]], *implementations: Implementation) -> None:
    """Enter an op: its cost as a function of its arguments, and its implementations, best first."""
    _TABLE[op], _COSTS[op] = implementations, cost


def cost(op: str, *args: Any) -> tuple[int, int]:
    """FLOPs of a call and the bytes it cannot do without moving; ``args`` as the registered op takes them."""
    _implementations(op)
    return _COSTS[op](*args)


def ops() -> tuple[str, ...]:
    """Names of all registered ops."""
    return tuple(_TABLE)


@contextmanager
def force(op: str, implementation: str) -> Iterator[None]:
    """Within the block, run ``op`` with the named implementation or fail with its reason.

    Raises: InputError on an unknown op or implementation.
    """
    names = [i.name for i in _implementations(op)]
    if implementation not in names:
        raise InputError(f"{op}: expected an implementation out of {', '.join(names)}, got {implementation!r}")
    token = _FORCED.set(MappingProxyType({**_FORCED.get(), op: implementation}))
    try:
        yield
    finally:
        _FORCED.reset(token)


def explain(op: str, *args: Any) -> dict[str, str | None]:
    """Per implementation, best first: None when it would run this call, else why it refuses."""
    forced = _FORCED.get().get(op)
    return {i.name: _reason(i, forced, args) for i in _implementations(op)}


def run(op: str, *args: Any) -> Any:
    """Run ``op`` with the first implementation that does not refuse.

    Raises: UnsupportedError listing every implementation with its reason when all refuse.
    """
    forced = _FORCED.get().get(op)
    for implementation in _implementations(op):
        if _reason(implementation, forced, args) is None:
            with _check.plain(next(a for a in args if a is not None)):
                return implementation.run(*args)
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in explain(op, *args).items())
    raise UnsupportedError(f"{op}: no implementation can run this call{reasons}")


def _implementations(op: str) -> tuple[Implementation, ...]:
    if op not in _TABLE:
        raise InputError(f"op: expected one of {', '.join(_TABLE)}, got {op!r}")
    return _TABLE[op]


def _reason(implementation: Implementation, forced: str | None, args: tuple[Any, ...]) -> str | None:
    if forced is not None and forced != implementation.name:
        return f"{forced} is forced"
    if forced is None and not implementation.by_choice:
        return "runs only when forced"
    return implementation.refuses(*args)
