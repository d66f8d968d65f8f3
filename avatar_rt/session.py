"""One stream: its sound, its state, and the loop that makes frames of them, on one screen."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME, AvatarConfig, SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.decode import decode_chunk, motion_of, still_of
from avatar_rt.pipeline.denoise import ChunkState, Conditions, Scene, denoise_chunk
from avatar_rt.pipeline.likeness import Likeness
from avatar_rt.pipeline.reference import ReferenceCache, encode_reference, pack_cache
from avatar_rt.pipeline.schedule import Schedule, make_schedule
from avatar_rt.prepared import Reference
from avatar_rt.runtime.stream import Head, Made, Span, Stream
from avatar_rt.runtime.trace import stage
from avatar_rt.runtime.turns import Turns


class Models(Protocol):
    """What a session needs of an engine; shared by all sessions and never written to."""

    config: AvatarConfig
    device: torch.device
    dit: VideoRefDiT
    vae: VideoVAE
    speech: SpeechEncoder
    motion: MotionEncoder
    turns: Turns

    def embed_text(self, prompt: str = "") -> Tensor:
        """[1, S, D] context of a prompt."""
        ...


@dataclass(frozen=True)
class SessionState:
    """Where a stream stands after the last chunk shown: with its sound from the beginning, it goes on from here.

    Attributes:
        index, frames: Chunks and frames shown so far.
        chunk: What the next chunk is carried on from.
        decoder: Convolution state of the VAE decoder; empty before the first chunk.
    """

    index: int = 0
    frames: int = 0
    chunk: ChunkState = field(default_factory=ChunkState)
    decoder: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ChunkStats:
    """About the chunk that ``frames()`` yielded last.

    Attributes:
        generation: Interruptions before it.
        index, start, frames: Which chunk it is, its first frame, how many frames it has.
        sound: fp32 [S] at 16 kHz, what is to be played with these frames.
        motion: fp32 [frames, 62] in natural units (``models.motion.MOTION_NAMES``), the face's motion that was
            generated with these frames; None from a model without a motion stream.
        seconds: ``turn`` (waiting for the engine), ``denoise`` (with the speech encoder) and ``decode``.
    """

    generation: int = 0
    index: int = -1
    start: int = 0
    frames: int = 0
    sound: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    motion: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Session:
    """One stream: sound goes in, frames come out. Keeps the sound and the state that chunks to come need, and no frame.

    One thread may push sound while another iterates over ``frames()`` and any other interrupts or closes. Memory does
    not grow with time: sound that no later chunk hears is forgotten, at most ``runtime.stream.AHEAD`` chunks of latents
    wait, and nothing is decoded before the consumer asks for it. Sessions of one engine take turns, chunk by chunk.

    Args:
        queue_seconds: ``push_audio`` waits while this much sound is not yet shown. None: it never waits, for sound that
            is in memory anyway and for a thread that both pushes and iterates.
        overlap: Denoise the next chunk in a thread while this one is decoded and used. The frames are the same.
        likeness: The reference's person as a guide for the solver, or None.
        late: Frames by which the person's mouth is later than the model makes it: the model hears the sound so much
            later, no more than lies ahead of a frame in what it hears.

    Raises: InputError when ``queue_seconds`` is less than the first chunk hears.
    """

    def __init__(
        self,
        engine: Models,
        reference: Reference,
        scene: Scene,
        prompt: str,
        seed: int,
        sampling: SamplingConfig,
        use_cache: bool,
        queue_seconds: float | None = None,
        overlap: bool = True,
        likeness: Likeness | None = None,
        late: int = 0,
    ) -> None:
        self.engine, self.reference, self.scene, self.likeness = engine, reference, scene, likeness
        cfg = engine.config
        with torch.inference_mode():
            self.empty_text = engine.embed_text()
            self.text = engine.embed_text(prompt) if prompt else self.empty_text
        self.schedule = make_schedule(sampling, cfg.chunk, seed, has_text=bool(prompt))
        self.overlap, self.stats = overlap, ChunkStats()
        self._cache = pack_cache(reference.cache) if use_cache else None
        # Not a method of this session: it goes, with its reference, when its last user does and not at a collection.
        span = functools.partial(_span, self.schedule, cfg.dit.audio_per_latent, engine.speech.context, late)
        self._stream = Stream(span, Head(0, ChunkState()), queue_seconds)
        self._decoder: tuple[Tensor, ...] = ()
        self._open = threading.Lock()  # held by the one iteration over frames()

    # ---- sound in --------------------------------------------------------------------------------------------------

    def push_audio(
        self, samples: np.ndarray, *, original: np.ndarray | None = None, timeout: float | None = None
    ) -> bool:
        """Appends speech; waits for room first where ``queue_seconds`` is set.

        Args:
            samples: fp32 [S], 16 kHz mono, at about -16 LUFS (``media.audio.LiveLoudness`` brings a live source there).
            original: fp32 [S], the same sound as it is to be played (``stats.sound``); None: ``samples``.
            timeout: Seconds to wait for room; None as long as it takes, 0 not at all.

        Returns: False when nothing was taken, for want of room or because the session is closed.
        Raises: InputError on another shape, samples that are not finite, and after ``end_audio``.
        """
        heard = _mono(samples)
        played = heard if original is None else _mono(original)
        if len(played) != len(heard):
            raise InputError(
                f"push_audio: expected as many original samples as samples, {len(heard)}, got {len(played)}"
            )
        return self._stream.push(np.stack([heard, played]), timeout)

    def push_silence(self, seconds: float, *, timeout: float | None = None) -> bool:
        """Appends silence as ``push_audio`` would: the face goes on and says nothing."""
        return self.push_audio(np.zeros(round(seconds * SAMPLE_RATE), np.float32), timeout=timeout)

    def end_audio(self) -> None:
        """Says that no more sound comes: what is left is generated to its end."""
        self._stream.end()

    def interrupt(self) -> int:
        """Barge-in: drops the sound and the chunks not yet yielded. The stream goes on from the last chunk yielded.

        What is pushed next follows the frames yielded so far. An ``end_audio`` is taken back, unless the end has been
        shown in the middle of a chunk. Returns the generation that the chunks to come belong to.
        """
        return self._stream.interrupt()

    def close(self) -> None:
        """Stops generation within one step; who waits for room or for frames waits no longer."""
        self._stream.close()

    @property
    def total_frames(self) -> int:
        """Frames that the sound pushed so far lasts, at 25 fps."""
        return self._stream.total_frames

    @property
    def room(self) -> int | None:
        """Samples that may be pushed before ``push_audio`` waits; None without ``queue_seconds``."""
        return self._stream.room

    @property
    def working(self) -> bool:
        """Whether a chunk is being made or waits to be yielded; False while sound is missing."""
        return self._stream.working

    @property
    def dropped(self) -> int:
        """Chunks that were made and never yielded."""
        return self._stream.dropped

    # ---- frames out ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def frames(self, *, wait: bool = False, idle_after: float | None = None) -> Generator[np.ndarray]:
        """Yields frames uint8 [n, H, W, 3] chunk by chunk; ``stats`` is about the last one.

        Args:
            wait: Wait for sound until ``end_audio`` or ``close``. Otherwise return where sound is missing: what is
                pushed later is for the next call, which goes on from there.
            idle_after: With ``wait``: when no sound has come for so many seconds, go on with silence. Sound that comes
                then takes the place of the silence not yet yielded.

        Raises: InputError when another iteration is still open.
        """
        stream, engine = self._stream, self.engine
        with self._denoising(wait, idle_after) as next_made:
            while (made := next_made()) is not None:
                begun = time.perf_counter()
                pictures, decoder = decode_chunk(
                    engine.vae, made.content, self._decoder or None, engine.config.output_scale
                )
                frames = pictures.frames.cpu().numpy()
                seconds = made.seconds | {"decode": time.perf_counter() - begun}
                start, generation = stream.frames, stream.generation
                if (show := stream.show(made, len(frames))) is None:
                    continue  # an interruption came while it was decoded
                count, sound = show
                self._decoder = decoder
                motion = motion_of(engine.motion, made.content, len(frames))
                told = None if motion is None else motion[:count]
                self.stats = ChunkStats(generation, made.head.index - 1, start, count, sound, told, seconds)
                yield frames[:count]

    def _denoise(self, wait: bool, idle_after: float | None, stopped: Callable[[], bool]) -> bool:
        """Makes the latents of the next chunk once there are sound and room for it; False when there will be none."""
        job = self._stream.next_job(wait, idle_after, stopped)
        if job is None:
            return False
        engine, begun = self.engine, time.perf_counter()

        def stale() -> bool:
            return stopped() or self._stream.is_stale(job)

        with engine.turns.take(stale) as mine:
            if not mine:
                return True
            started = time.perf_counter()
            with stage("speech"):
                audio = engine.speech(torch.from_numpy(job.sound).to(engine.device), has_context=True)
            given = Conditions(self.scene, audio, self.text, self.empty_text, self.likeness)
            plan = self.schedule.plan(job.head.index)
            result = denoise_chunk(
                engine.dit, engine.config, self.schedule, plan, job.head.state, self._reference, given, stale,
                still_of=functools.partial(still_of, engine.vae),
            )  # fmt: skip
        if result is not None:
            seconds = {"turn": started - begun, "denoise": time.perf_counter() - started}
            self._stream.add(job, *result, seconds)
        return True

    def _reference(self) -> ReferenceCache:
        return self._cache or encode_reference(self.engine.dit, self.reference.context)

    @contextmanager
    def _denoising(self, wait: bool, idle_after: float | None) -> Iterator[Callable[[], Made | None]]:
        """Chunks are made as long as the block lasts; gives what waits for the next one, None when none will come."""
        if not self._open.acquire(blocking=False):
            raise InputError("frames: expected one iteration over a session at a time, got a second")
        stop, errors = threading.Event(), []

        def work() -> None:
            try:
                with torch.inference_mode():
                    while self._denoise(wait, idle_after, stop.is_set):
                        pass
            except BaseException as e:  # whatever it is, the iteration raises it
                errors.append(e)
            finally:
                done.set()
                self._stream.wake()

        def next_made() -> Made | None:
            if not self.overlap:
                while (made := self._stream.first()) is None and self._denoise(wait, idle_after, stop.is_set):
                    pass
                return made
            made = self._stream.first(making=lambda: not done.is_set())
            if made is None and errors:
                raise errors[0]
            return made

        done = threading.Event()
        thread = threading.Thread(target=work, name="denoise", daemon=True)
        try:
            if self.overlap:
                thread.start()
            yield next_made
        finally:
            stop.set()
            self._stream.wake()
            if thread.ident is not None:
                thread.join()
            self._open.release()

    # ---- to stop here and go on elsewhere --------------------------------------------------------------------------

    def state(self) -> SessionState:
        """Where the stream stands after the last chunk yielded; for the thread that iterates."""
        shown = self._stream.shown
        return SessionState(shown.index, self._stream.frames, shown.state, self._decoder)

    def restore(self, state: SessionState) -> None:
        """Goes on from there. The sound is pushed from its beginning again; frames come from ``state.frames`` on.

        Raises: InputError when this session has got sound already.
        """
        self._stream.resume(Head(state.index, state.chunk), state.frames)
        self._decoder = state.decoder


def _span(schedule: Schedule, per: int, context: tuple[int, int], late: int, index: int) -> Span:
    """The index-th chunk on the timeline. Its sound is that of all its frames with the speech encoder's context."""
    plan = schedule.plan(index)
    heard, (left, right) = schedule.frames_of(plan, per), context
    late = min(late * SAMPLES_PER_FRAME, right)  # a chunk is made when its last frame's own sound is there, not before
    low, high = heard.start * SAMPLES_PER_FRAME - left - late, heard.stop * SAMPLES_PER_FRAME + right - late
    return Span(low, high, max(per * (plan.start + plan.overlap - 1) + 1, 0), heard.stop)


def _mono(samples: np.ndarray) -> np.ndarray:
    """A copy as fp32 [S]."""
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(f"push_audio: expected finite mono samples [S], got shape {list(samples.shape)}")
    return samples.astype(np.float32)
