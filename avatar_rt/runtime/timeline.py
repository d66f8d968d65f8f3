"""The sound of a stream by absolute sample: grows at its end, is forgotten at its start, can be cut back."""

from __future__ import annotations

from collections import deque

import numpy as np


class Timeline:
    """Sound of ``rows`` channels, fp32, from sample ``start`` to sample ``end``; silence everywhere else.

    Holds what was appended and not yet forgotten, in the pieces it came in: a stream of any length takes the memory of
    what is still needed. Not thread-safe.
    """

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows
        self.start = self.end = 0
        self._pieces: deque[np.ndarray] = deque()

    def append(self, samples: np.ndarray) -> None:
        """Adds [rows, S] at the end; the array is kept, not copied."""
        assert samples.ndim == 2 and len(samples) == self.rows, samples.shape
        if samples.shape[1]:
            self._pieces.append(samples)
            self.end += samples.shape[1]

    def cut(self, at: int) -> None:
        """Ends the sound at sample ``at``: what is later is dropped, what is missing until there is silence."""
        if at >= self.end:
            self.append(np.zeros((self.rows, at - self.end), np.float32))
            return
        while self._pieces and self.end - self._pieces[-1].shape[1] >= at:
            self.end -= self._pieces.pop().shape[1]
        if self.end > at:
            self._pieces[-1] = self._pieces[-1][:, : at - self.end]
        self.end = at
        self.start = min(self.start, at)

    def forget(self, before: int) -> None:
        """Lets go of the pieces that lie wholly before a sample."""
        while self._pieces and self.start + self._pieces[0].shape[1] <= before:
            self.start += self._pieces.popleft().shape[1]

    def read(self, low: int, high: int) -> np.ndarray:
        """Samples low..high - 1: [rows, high - low] fp32, a copy. Both may lie outside of the sound."""
        out = np.zeros((self.rows, high - low), np.float32)
        at = self.start
        for piece in self._pieces:
            if at >= high:
                break
            a, b = max(low, at), min(high, at + piece.shape[1])
            if a < b:
                out[:, a - low : b - low] = piece[:, a - at : b - at]
            at += piece.shape[1]
        return out
