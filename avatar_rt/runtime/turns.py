"""Who may compute now: callers of one engine take turns in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 0.02  # how often a waiting caller asks whether it still wants its turn


class Turns:
    """A lock that is handed on first come, first served.

    A plain lock may be taken again by who has just let go of it. Sessions that ask for a turn per chunk get one chunk
    each, in a circle, however fast or slow they are.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Callers in the line, with the one whose turn it is."""
        return len(self._line)

    @contextmanager
    def take(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Waits for a turn, which lasts as long as the block. False, and no turn, once ``cancelled`` says so."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        try:
            with self._changed:
                while (first := self._line[0] is ticket) is False and not cancelled():
                    self._changed.wait(_LOOK_SECONDS)
            yield first
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()
