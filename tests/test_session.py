"""Streaming: sound in pieces, two threads, back-pressure, cancelling, idling, barge-in; the frames stay the same."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from serve_client import until

from avatar_rt import AvatarEngine, InputError
from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME
from avatar_rt.media.audio import read_audio
from avatar_rt.runtime.stream import AHEAD
from avatar_rt.session import Reference, Session

SAMPLES = Path(__file__).resolve().parents[1] / "avatar_rt" / "samples"
PIECE = SAMPLE_RATE // 50  # 20 ms


@pytest.fixture(scope="module")
def engine() -> AvatarEngine:
    return AvatarEngine()


@pytest.fixture(scope="module")
def reference(engine: AvatarEngine) -> Reference:
    return engine.prepare(SAMPLES / "reference.mp4")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    # 97 frames: ends in the middle of a chunk, and of a frame
    return read_audio(SAMPLES / "speech.wav").samples[: 4 * SAMPLE_RATE - 2000]


def open_(engine: AvatarEngine, reference: Reference, **options) -> Session:
    return engine.session(reference, **({"steps": 1} | options))


def video_of(session: Session, speech: np.ndarray) -> np.ndarray:
    session.push_audio(speech)
    session.end_audio()
    return np.concatenate(list(session.frames()))


@pytest.fixture(scope="module")
def whole(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> np.ndarray:
    """The video of the whole file, pushed at once, made by one thread."""
    return video_of(open_(engine, reference, overlap=False), speech)


def push_pieces(session: Session, speech: np.ndarray, *, end: bool = True) -> threading.Thread:
    def push() -> None:
        for at in range(0, len(speech), PIECE):
            session.push_audio(speech[at : at + PIECE])
        if end:
            session.end_audio()

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    return thread


class Slow:
    """Stands for a transformer whose steps can be counted, and held up."""

    def __init__(self, dit: torch.nn.Module) -> None:
        self.dit, self.steps, self.go = dit, 0, threading.Event()
        self.go.set()

    def __call__(self, *args, **kwargs):
        self.steps += 1
        assert self.go.wait(20)
        return self.dit(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.dit, name)


@pytest.fixture
def slow(engine: AvatarEngine) -> Iterator[Slow]:
    dit = engine.dit
    engine.dit = Slow(dit)  # type: ignore[assignment]
    yield engine.dit  # type: ignore[misc]
    engine.dit.go.set()
    engine.dit = dit


# ---- the same frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_pieces_of_20_ms_give_the_video_of_the_whole_file(
    engine: AvatarEngine, reference: Reference, speech: np.ndarray, whole: np.ndarray, overlap: bool
) -> None:
    session = open_(engine, reference, queue_seconds=2.0, overlap=overlap)
    push_pieces(session, speech)
    assert np.array_equal(whole, np.concatenate(list(session.frames(wait=True))))
    assert len(whole) == session.total_frames == 97


def test_without_waiting_it_goes_on_where_it_stopped(engine, reference, speech, whole) -> None:
    session, got = open_(engine, reference), []
    for at in range(0, len(speech), SAMPLE_RATE):
        session.push_audio(speech[at : at + SAMPLE_RATE])
        got += list(session.frames())
    assert [len(f) for f in got] == [29, 24, 24]
    session.end_audio()
    got += list(session.frames())
    assert np.array_equal(whole, np.concatenate(got))
    assert list(session.frames()) == []


def test_another_session_goes_on_from_the_state(engine, reference, speech, whole) -> None:
    first = open_(engine, reference)
    first.push_audio(speech)
    frames = first.frames()
    shown = sum(len(f) for f in itertools.islice(frames, 2))
    state = first.state()
    frames.close()
    assert (state.index, state.frames, shown) == (2, 53, 53)
    second = open_(engine, reference)
    second.restore(state)
    second.push_audio(speech)
    second.end_audio()
    assert np.array_equal(whole[53:], np.concatenate(list(second.frames())))
    with pytest.raises(InputError, match="no sound yet"):
        second.restore(state)


def test_stats_tell_of_each_chunk_and_its_sound(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    session, played, seen = open_(engine, reference), [], []
    session.push_audio(speech, original=speech * 0.5)
    session.end_audio()
    for frames in session.frames():
        stats = session.stats
        seen.append((stats.index, stats.start, stats.frames))
        played.append(stats.sound)
        assert stats.frames == len(frames) and len(stats.sound) == len(frames) * SAMPLES_PER_FRAME
        assert stats.motion is not None and stats.motion.shape == (len(frames), 62)
        assert set(stats.seconds) == {"turn", "denoise", "decode"} and stats.seconds["denoise"] > 0
    assert seen == [(0, 0, 29), (1, 29, 24), (2, 53, 24), (3, 77, 20)]
    sound = np.concatenate(played)
    assert np.array_equal(sound[: len(speech)], speech * 0.5) and not sound[len(speech) :].any()


# ---- memory and back-pressure --------------------------------------------------------------------------------------


def test_a_slow_consumer_stops_generation(engine, reference, speech, slow) -> None:
    session = open_(engine, reference)
    first, later = len(session.schedule.passes), len(session.schedule.carried_passes)
    session.push_audio(np.tile(speech, 3))
    frames = session.frames()
    next(frames)
    until(lambda: len(session._stream._made) == AHEAD)
    time.sleep(0.3)
    assert slow.steps == first + AHEAD * later and len(session._stream._made) == AHEAD
    next(frames)
    until(lambda: slow.steps >= first + (1 + AHEAD) * later)
    frames.close()


def test_the_first_frame_has_the_machine_to_itself(engine, reference, speech, slow, monkeypatch) -> None:
    import avatar_rt.session as module

    decode, steps = module.decode_chunk, []

    def look(*given):
        time.sleep(0.1)
        steps.append(slow.steps)
        return decode(*given)

    monkeypatch.setattr(module, "decode_chunk", look)
    session = open_(engine, reference)
    session.push_audio(speech)
    next(session.frames())
    assert steps == [len(session.schedule.passes)]


def test_pushing_waits_for_room(engine: AvatarEngine, reference: Reference) -> None:
    session, second = open_(engine, reference, queue_seconds=1.5), np.zeros(SAMPLE_RATE, np.float32)
    assert session.room == 24_000
    assert session.push_audio(second, timeout=0) and session.push_audio(second, timeout=0)
    assert session.room == -8_000 and not session.push_audio(second, timeout=0)
    begun = time.monotonic()
    assert not session.push_audio(second, timeout=0.2) and time.monotonic() - begun >= 0.2
    waiting = push_pieces(session, second[: 2 * PIECE], end=False)
    assert waiting.is_alive()
    frames = session.frames(wait=True)
    next(frames)  # 29 frames make room
    waiting.join(10)
    assert not waiting.is_alive() and session.room == 24_000 + 29 * 640 - 32_000 - 2 * PIECE
    session.push_audio(second)
    blocked = push_pieces(session, second, end=False)
    session.close()
    blocked.join(10)
    assert not blocked.is_alive() and not session.push_audio(second)
    with pytest.raises(InputError, match=r"queue_seconds: expected at least the 1\.3"):
        open_(engine, reference, queue_seconds=1.0)


# ---- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "drop"])
def test_cancelling_takes_effect_within_one_step(
    engine: AvatarEngine, reference: Reference, speech: np.ndarray, slow: Slow, how: str
) -> None:
    session = open_(engine, reference, steps=50)
    passes = len(session.schedule.passes)
    session.push_audio(speech)
    got: list[np.ndarray] = []
    frames = session.frames(wait=True)
    reader = threading.Thread(target=lambda: got.extend(frames), daemon=True)
    reader.start()
    until(lambda: slow.steps > 2 * passes)
    if how == "close":
        session.close()
    else:
        session.interrupt()
    before = slow.steps
    until(lambda: not reader.is_alive() or how == "drop")
    assert slow.steps - before <= passes  # the step that was under way
    if how == "drop":  # there is no sound any more: it waits
        until(lambda: engine.turns.waiting == 0)
        assert slow.steps - before <= passes
        session.close()
        reader.join(10)
    assert not got and not reader.is_alive()


def test_leaving_the_iteration_stops_the_thread(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    session = open_(engine, reference)
    session.push_audio(speech)
    frames = session.frames(wait=True)
    next(frames)
    with pytest.raises(InputError, match="one iteration"):
        next(session.frames())
    frames.close()
    assert not [t for t in threading.enumerate() if t.name == "denoise"]


def test_an_error_in_the_thread_reaches_the_iteration(engine, reference, speech, monkeypatch) -> None:
    session = open_(engine, reference)
    session.push_audio(speech)
    monkeypatch.setattr("avatar_rt.session.denoise_chunk", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(session.frames())


# ---- silence -------------------------------------------------------------------------------------------------------


def test_pushed_silence_is_silence(engine: AvatarEngine, reference: Reference) -> None:
    videos = []
    for push in (lambda s: s.push_silence(1.2), lambda s: s.push_audio(np.zeros(19_200, np.float32))):
        session = open_(engine, reference)
        push(session)
        session.end_audio()
        videos.append(np.concatenate(list(session.frames())))
    assert len(videos[0]) == 30 and np.array_equal(*videos)


def test_the_face_idles_when_no_sound_comes(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    """It goes on by itself, and what it idles is the video of silence."""
    session = open_(engine, reference)
    frames = session.frames(wait=True, idle_after=0.05)
    idle = np.concatenate([next(frames), next(frames)])
    silent = open_(engine, reference)
    silent.push_silence(4)
    assert np.array_equal(idle, np.concatenate(list(itertools.islice(silent.frames(), 2))))
    # Speech takes the place of the silence not yet shown: it begins with the next frame.
    until(lambda: len(session._stream._made) == AHEAD)
    session.push_audio(speech)
    session.end_audio()
    next(frames)
    assert session.stats.start == 53 and session.dropped >= AHEAD
    assert np.array_equal(session.stats.sound, speech[: 24 * SAMPLES_PER_FRAME])
    assert sum(len(f) for f in frames) == 97 - 24


# ---- barge-in ------------------------------------------------------------------------------------------------------


def test_interruption_goes_on_from_what_was_shown(engine, reference, speech) -> None:
    """After two chunks of A comes B: the same as a session that is restored there and finds B after what was shown."""
    session = open_(engine, reference)
    session.push_audio(speech)
    session.end_audio()
    frames = session.frames(wait=True)
    shown = [next(frames), next(frames)]
    until(lambda: len(session._stream._made) == AHEAD)
    assert session.interrupt() == 1 and session.dropped == AHEAD
    other = speech[::-1].copy()
    session.push_audio(other)
    session.end_audio()
    after = []
    for f in frames:
        after.append(f)
        assert session.stats.generation == 1
    expected = open_(engine, reference)
    state = session_state_after_two(engine, reference, speech)
    expected.restore(state)
    expected.push_audio(np.concatenate([speech[: 53 * SAMPLES_PER_FRAME], other]))
    expected.end_audio()
    assert np.array_equal(np.concatenate(after), np.concatenate(list(expected.frames())))
    assert len(np.concatenate(after)) == 97 and sum(map(len, shown)) == 53


def session_state_after_two(engine: AvatarEngine, reference: Reference, speech: np.ndarray):
    session = open_(engine, reference)
    session.push_audio(speech)
    for _ in itertools.islice(session.frames(), 2):
        pass
    return session.state()


def test_interruption_while_a_chunk_is_decoded_drops_it(engine, reference, speech, monkeypatch) -> None:
    import avatar_rt.session as module

    session, decode = open_(engine, reference), module.decode_chunk
    once = iter([True])

    def interrupted(*given):
        if next(once, False):
            session.interrupt()
            session.push_audio(speech[:SAMPLE_RATE])
            session.end_audio()
        return decode(*given)

    monkeypatch.setattr(module, "decode_chunk", interrupted)
    session.push_audio(speech)
    assert sum(len(f) for f in session.frames(wait=True)) == 25
    assert session.stats.generation == 1


def test_an_end_in_the_middle_of_a_chunk_stays_the_end(engine, reference, speech) -> None:
    session = open_(engine, reference)
    session.push_audio(speech[:SAMPLE_RATE])
    session.end_audio()
    assert [len(f) for f in session.frames()] == [25]
    session.interrupt()
    with pytest.raises(InputError, match="already ended"):
        session.push_audio(speech)


# ---- many sessions --------------------------------------------------------------------------------------------------


def test_sessions_take_turns_and_give_their_own_frames(engine, reference, speech, slow) -> None:
    order: list[int] = []
    videos: list[list[np.ndarray]] = [[], [], []]
    whole = video_of(open_(engine, reference, overlap=False), speech)  # by the passes that are counted, not recorded
    slow.go.clear()

    def run(i: int) -> None:
        session = open_(engine, reference)
        session.push_audio(speech)
        session.end_audio()
        for frames in session.frames():
            videos[i].append(frames)
            order.append(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: engine.turns.waiting == 3)
    slow.go.set()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(whole, np.concatenate(v)) for v in videos)
    for i in range(1, 7):  # nobody is two chunks ahead of another
        counts = [order[:i].count(who) for who in range(3)]
        assert max(counts) - min(counts) <= 2, order
