"""What lies between the threads of a stream: sound that waits to be heard, and chunks that wait to be shown."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME
from avatar_rt.errors import InputError
from avatar_rt.runtime.timeline import Timeline

AHEAD = 2  # chunks that may wait to be shown


class Span(NamedTuple):
    """A chunk on the timeline: it hears samples low..high - 1, its own frames are new..end - 1."""

    low: int
    high: int
    new: int
    end: int


@dataclass(frozen=True, eq=False)
class Head:
    """What the next chunk is carried on from. Two heads are the same only if they are one object."""

    index: int
    state: Any


class Job(NamedTuple):
    """A chunk to make: where it goes on, and its sound fp32 [1, S]."""

    head: Head
    span: Span
    sound: np.ndarray


@dataclass(frozen=True, eq=False)
class Made:
    """A chunk that waits to be shown, and the head that the next one was given."""

    content: Any
    head: Head
    span: Span
    seconds: dict[str, float]


class Stream:
    """The sound, the chunks made and the last chunk shown. Every method may be called from any thread.

    A chunk is stale as soon as the sound that it hears has changed: its job's head is no longer the stream's, or it is
    no longer in line.

    Args:
        span: The index-th chunk on the timeline.
        head: What chunk 0 is carried on from.
        queue_seconds: Sound that may wait to be shown before ``push`` waits; None is any.
    """

    def __init__(self, span: Callable[[int], Span], head: Head, queue_seconds: float | None) -> None:
        least = span(0).high / SAMPLE_RATE
        if queue_seconds is not None and not queue_seconds >= least:
            raise InputError(f"queue_seconds: expected at least the {least:.2f} a chunk hears, got {queue_seconds}")
        self._span, self._limit = span, queue_seconds
        self._changed = threading.Condition()
        self._sound = Timeline(2)  # rows: what is heard, what is played
        self._idle_from: int | None = None  # from this sample on it is silence that nobody pushed
        self._pushed_at = time.monotonic()
        self._made: deque[Made] = deque()
        self.head = self.shown = head
        self.frames = 0  # shown so far
        self.dropped = 0  # chunks that were made and not shown
        self.generation = 0
        self.ended = self.closed = False
        self._making = False

    # ---- who pushes sound ------------------------------------------------------------------------------------------

    @property
    def total_frames(self) -> int:
        """Frames that the sound lasts; the last one may be half silent."""
        return -(-self._sound.end // SAMPLES_PER_FRAME)

    @property
    def room(self) -> int | None:
        """Samples that may be pushed before ``push`` waits; None is any number."""
        return None if self._limit is None else round(self._limit * SAMPLE_RATE) + self._played - self._sound.end

    def push(self, piece: np.ndarray, timeout: float | None) -> bool:
        """Appends sound [2, S] once there is room; False when there was none in time or the stream is closed."""

        def ready() -> bool:
            return self.closed or self.ended or self.room is None or self.room > 0

        with self._changed:
            in_time = self._changed.wait_for(ready, timeout)
            if self.ended:
                raise InputError("push_audio: the sound of this session has already ended")
            if self.closed or not in_time:
                return False
            self._end_idling()
            self._sound.append(piece)
            self._sound.forget(self._span(self.shown.index).low)
            self._pushed_at = time.monotonic()
            self._changed.notify_all()
        return True

    def end(self) -> None:
        """No more sound comes."""
        with self._changed:
            self._end_idling()
            self.ended = True
            self._changed.notify_all()

    def interrupt(self) -> int:
        """Drops everything not shown; unless the end was shown in the middle of a chunk, the stream is open again."""
        with self._changed:
            in_a_chunk = self.shown.index > 0 and self.frames < self._span(self.shown.index - 1).end
            self.ended, self._idle_from = self.ended and in_a_chunk, None
            self._cut(self._played)
            self.generation += 1
            self._changed.notify_all()
            return self.generation

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    # ---- who makes chunks ------------------------------------------------------------------------------------------

    def next_job(self, wait: bool, idle_after: float | None, stopped: Callable[[], bool]) -> Job | None:
        """Waits for sound (if ``wait``) and for room in the line; None when there is nothing to make."""
        with self._changed:
            self._making = False
            while not (self.closed or stopped()):
                span = self._span(self.head.index)
                if len(self._made) >= (AHEAD if self.frames else 1):  # nothing competes with the first frame
                    self._changed.wait()
                elif self._sound.end >= span.high or (self.ended and span.new < self.total_frames):
                    self._making = True
                    return Job(self.head, span, self._sound.read(span.low, span.high)[:1])
                elif self.ended or not wait:
                    return None
                elif idle_after is None or (left := self._pushed_at + idle_after - time.monotonic()) > 0:
                    self._changed.wait(None if idle_after is None else left)
                else:
                    self._idle_from = self._sound.end if self._idle_from is None else self._idle_from
                    self._sound.cut(span.high)
        return None

    def is_stale(self, job: Job) -> bool:
        """Whether nobody wants this chunk any more. Takes no lock: asked before every solver step."""
        return self.closed or self.head is not job.head

    def add(self, job: Job, content: Any, state: Any, seconds: dict[str, float]) -> None:
        """Puts a finished chunk in line, unless it is stale."""
        with self._changed:
            if not self.is_stale(job):
                self.head = Head(job.head.index + 1, state)
                self._made.append(Made(content, self.head, job.span, seconds))
                self._changed.notify_all()

    @property
    def working(self) -> bool:
        """Whether a chunk is being made or waits to be shown."""
        return self._making or bool(self._made)

    # ---- who shows them --------------------------------------------------------------------------------------------

    def first(self, making: Callable[[], bool] = lambda: False) -> Made | None:
        """The chunk to show next, waited for while ``making``; it stays in line until it is shown."""
        with self._changed:
            self._changed.wait_for(lambda: self._made or self.closed or not making())
            return self._made[0] if self._made and not self.closed else None

    def show(self, made: Made, count: int) -> tuple[int, np.ndarray] | None:
        """Takes a chunk of ``count`` frames out of line: how many of them to show, and what to play with them [S].

        None when it has become stale.
        """
        with self._changed:
            if self.closed or not self._made or self._made[0] is not made:
                return None
            self._made.popleft()
            count = min(count, self.total_frames - self.frames)
            start, self.frames, self.shown = self._played, self.frames + count, made.head
            sound = self._sound.read(start, self._played)[1]
            self._sound.forget(self._span(self.shown.index).low)
            self._changed.notify_all()
            return count, sound

    def wake(self) -> None:
        """Lets everybody who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def resume(self, head: Head, frames: int) -> None:
        """Goes on where another stream stood. Raises InputError once there is sound."""
        with self._changed:
            if self._sound.end or self.head.index:
                raise InputError("restore: expected a session that has got no sound yet")
            self.head = self.shown = head
            self.frames = frames

    # ---- with the lock held ----------------------------------------------------------------------------------------

    @property
    def _played(self) -> int:
        return self.frames * SAMPLES_PER_FRAME

    def _cut(self, at: int) -> None:
        """The sound ends at a sample: what was made of later sound is dropped."""
        self._sound.cut(at)
        while self._made and self._made[-1].span.high > at:
            self._made.pop()
            self.dropped += 1
        self.head = replace(self._made[-1].head if self._made else self.shown)

    def _end_idling(self) -> None:
        """Silence that nobody pushed and nobody has seen gives way."""
        if self._idle_from is not None:
            self._cut(max(self._idle_from, self._played))
            self._idle_from = None
