"""What sessions are made of: turns on the engine, sound by absolute sample; and that they go."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from serve_client import until
from small_bundle import write_bundle

from avatar_rt import AvatarEngine
from avatar_rt.runtime.timeline import Timeline
from avatar_rt.runtime.turns import Turns


def test_turns_are_first_come_first_served() -> None:
    turns, order = Turns(), []
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.take():
            held.set()
            go.wait(10)

    def ask(i: int, cancelled: bool) -> None:
        with turns.take(lambda: cancelled) as mine:
            order.append((i, mine))

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    held.wait(10)
    for i in range(6):
        threads.append(threading.Thread(target=ask, args=(i, i == 2)))
        threads[-1].start()
        until(lambda i=i: turns.waiting == i + 2 - (i > 2) or i == 2)
    until(lambda: order == [(2, False)])
    go.set()
    for thread in threads:
        thread.join(10)
    assert order == [(2, False), (0, True), (1, True), (3, True), (4, True), (5, True)] and turns.waiting == 0


def test_timeline_is_the_sound_by_absolute_sample() -> None:
    random = np.random.default_rng(1)
    whole, timeline, forgotten = np.zeros((2, 0), np.float32), Timeline(2), 0
    for _ in range(200):
        piece = random.standard_normal((2, int(random.integers(0, 50)))).astype(np.float32)
        timeline.append(piece)
        whole = np.concatenate([whole, piece], axis=1)
        if random.random() < 0.2:
            at = int(random.integers(forgotten, whole.shape[1] + 30))
            timeline.cut(at)
            whole = np.pad(whole[:, :at], ((0, 0), (0, max(at - whole.shape[1], 0))))
        if random.random() < 0.3:
            forgotten = int(random.integers(forgotten, whole.shape[1] + 1))
            timeline.forget(forgotten)
        assert timeline.end == whole.shape[1] and timeline.start <= max(forgotten, 0) <= timeline.end
        low = int(random.integers(forgotten, whole.shape[1] + 20))
        high = low + int(random.integers(0, 60))
        padded = np.pad(whole, ((0, 0), (0, 100)))
        assert np.array_equal(timeline.read(low, high), padded[:, low:high])
    assert sum(p.shape[1] for p in timeline._pieces) == timeline.end - timeline.start
    assert np.array_equal(Timeline(1).read(-3, 2), np.zeros((1, 5), np.float32))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_session_goes_with_its_last_user(tmp_path: Path, overlap: bool) -> None:
    """It holds a reference's keys and values, which are large: no cycle keeps them until a collection."""
    random = np.random.default_rng(0)
    engine = AvatarEngine(write_bundle(tmp_path / "bundle"))
    reference = engine.prepare(random.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), cropped=True)
    gc.collect()
    gc.disable()
    try:
        session = engine.session(reference, overlap=overlap)
        session.push_audio(random.standard_normal(6000).astype(np.float32) * 0.1)
        session.end_audio()
        assert sum(len(frames) for frames in session.frames())
        gone = weakref.ref(session)
        del session
        assert gone() is None
    finally:
        gc.enable()
