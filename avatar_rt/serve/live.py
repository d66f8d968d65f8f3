"""A live session over a WebSocket: sound in, fragments of an mp4 out (``messages`` says how)."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from concurrent.futures import Executor
from typing import Any

import numpy as np
import soxr
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.audio import LiveLoudness
from avatar_rt.media.fragments import FragmentWriter
from avatar_rt.serve.limits import Limits
from avatar_rt.serve.messages import VERSION, Cancel, Credit, EndAudio, Interrupt, Open, parse
from avatar_rt.serve.people import People

log = logging.getLogger("avatar_rt.serve")
_OPEN_SECONDS = 10.0
POLICY, INTERNAL, DONE = 1008, 1011, 1000


class Ended(Exception):
    """The end of a session: its reason, and a sentence if something was wrong."""

    def __init__(self, reason: str, sentence: str | None = None, code: int = DONE) -> None:
        super().__init__(sentence or reason)
        self.reason, self.sentence, self.code = reason, sentence, code


class Sound:
    """The client's bytes to samples at 16 kHz: as they are to be played, and as the model is to hear them."""

    def __init__(self, rate: int, normalise: bool) -> None:
        self._rate, self._loudness = rate, LiveLoudness(SAMPLE_RATE) if normalise else None
        self.restart()

    def restart(self) -> None:
        """Forgets what the resampler has not given yet; the loudness of the speaker stays known."""
        same = self._rate == SAMPLE_RATE
        self._convert = None if same else soxr.ResampleStream(self._rate, SAMPLE_RATE, 1, dtype="float32")

    def __call__(self, data: bytes, *, last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """16-bit little-endian mono -> (heard, played), fp32 [S] each."""
        if len(data) % 2:
            raise InputError(f"sound: expected 16-bit samples, got {len(data)} bytes")
        played = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        if self._convert is not None:
            played = self._convert.resample_chunk(played, last=last)
        return (played if self._loudness is None else self._loudness(played)), played


class Live:
    """One connection. The event loop receives; one of ``threads`` takes frames, encodes and hands them over."""

    def __init__(
        self, socket: WebSocket, engine: AvatarEngine, people: People, limits: Limits, threads: Executor
    ) -> None:
        self.socket, self.engine, self.people, self.limits, self.threads = socket, engine, people, limits, threads
        self.id = "session_" + secrets.token_hex(8)
        self.frames_sent = self.chunks_sent = 0
        self._received = 0  # samples, at the client's rate
        self._credit = threading.Semaphore(0)
        self._asking = False  # whether the client has granted the next chunk
        self._closing = threading.Event()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """From the first message to the last. Raises nothing."""
        try:
            async with asyncio.timeout(self.limits.session_seconds):
                await self._serve()
        except Ended as e:
            await self._say_goodbye(e)
        except TimeoutError:
            await self._say_goodbye(Ended("time", f"a session lasts at most {self.limits.session_seconds:g} s"))
        except (WebSocketDisconnect, ConnectionError):
            pass
        except AvatarError as e:
            await self._say_goodbye(Ended("refused", str(e), POLICY))
        except Exception:
            log.exception("session %s", self.id)
            await self._say_goodbye(Ended("failed", "the server made a mistake", INTERNAL))

    async def _serve(self) -> None:
        opened = parse(await self._text(_OPEN_SECONDS))
        if not isinstance(opened, Open):
            raise InputError("message: expected session.open first")
        reference = self.people.get(opened.reference_id)
        if reference is None:
            raise InputError("reference_id: expected the id of a prepared reference, send the video again")
        self.opened, self._sound = opened, Sound(opened.sample_rate, opened.normalise)
        self.session = await asyncio.to_thread(
            self.engine.session, reference, prompt=opened.prompt, seed=opened.seed, steps=opened.steps,
            queue_seconds=self.limits.queue_seconds,
        )  # fmt: skip
        self._grant(opened.credit)
        await self._send({"type": "session.opened", "version": VERSION, "sample_rate": opened.sample_rate})
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self.threads, self._pump, loop)
        listen = asyncio.create_task(self._listen())
        try:
            done, _ = await asyncio.wait({work, listen}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise Ended("complete")
        finally:
            self._closing.set()
            self.session.close()
            self._credit.release()
            listen.cancel()
            await asyncio.gather(work, listen, return_exceptions=True)

    # ---- what the client says --------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            received = await self._receive(self.limits.quiet_seconds)
            if (data := received.get("bytes")) is not None:
                await self._hear(data)
                continue
            match parse(received["text"]):
                case Credit(chunks):
                    self._grant(chunks)
                case Interrupt():
                    generation = self.session.interrupt()
                    self._sound.restart()
                    await self._send({"type": "interrupted", "generation_id": generation})
                case EndAudio():
                    heard, played = self._sound(b"", last=True)
                    self.session.push_audio(heard, original=played, timeout=0)
                    self.session.end_audio()
                    self._sound.restart()
                case Cancel():
                    raise Ended("cancelled")
                case Open():
                    raise InputError("message: expected session.open only once")

    async def _hear(self, data: bytes) -> None:
        if self._room() == 0:
            sentence = f"sound: expected no more than {self.limits.queue_seconds:g} s ahead of the video; dropped"
            await self._send({"type": "error", "code": "audio_full", "message": sentence})
            return
        heard, played = self._sound(data)
        self.session.push_audio(heard, original=played, timeout=0)
        self._received += len(data) // 2

    def _grant(self, chunks: int) -> None:
        self._credit.release(chunks)

    async def _receive(self, seconds: float) -> dict[str, Any]:
        """The next message; ends the session when none has come for so long and it is the client's turn."""
        while True:
            try:
                async with asyncio.timeout(seconds):
                    message = await self.socket.receive()
                break
            except TimeoutError:
                if self._asking and self.session.working:
                    continue  # a chunk is on its way, and the client waits for us
                raise Ended("quiet", f"expected a message within {seconds:g} s", POLICY) from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", DONE))
        return dict(message)

    async def _text(self, seconds: float) -> str:
        text = (await self._receive(seconds)).get("text")
        if text is None:
            raise InputError("message: expected session.open first, got bytes")
        return text

    # ---- what it gets ----------------------------------------------------------------------------------------------

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: a chunk is asked for when the client has granted one, so who does not play is not served."""

        def send(about: dict[str, Any], data: bytes) -> None:
            sent = asyncio.run_coroutine_threadsafe(self._send(about, data), loop)
            try:
                sent.result(self.limits.send_seconds)
            except TimeoutError:
                sent.cancel()
                raise

        cfg = self.engine.config
        writer = FragmentWriter((cfg.height * cfg.output_scale, cfg.width * cfg.output_scale), SAMPLE_RATE)
        send({"type": "media_init", "mime": writer.mime}, writer.init)
        frames, count = self.session.frames(wait=True, idle_after=self.opened.idle_after), 0
        try:
            while self._wait_for_credit() and (pictures := next(frames, None)) is not None:
                stats, begun = self.session.stats, time.perf_counter()
                data = writer.write(pictures, stats.sound)
                seconds = stats.seconds | {"encode": time.perf_counter() - begun}
                about = self._chunk(count, stats.generation, stats.start, stats.frames)
                send(about | {"seconds": {k: round(v, 4) for k, v in seconds.items()}}, data)
                count += 1
                self.chunks_sent, self.frames_sent = count, self.frames_sent + stats.frames
            if not self._closing.is_set() and (rest := writer.finish()):
                send(self._chunk(count, self.session.stats.generation, self.frames_sent, 0), rest)
        except TimeoutError:
            sentence = f"expected the client to take a chunk within {self.limits.send_seconds:g} s"
            raise Ended("slow", sentence, POLICY) from None
        finally:
            frames.close()

    def _chunk(self, index: int, generation: int, start: int, frames: int) -> dict[str, Any]:
        return {
            "type": "chunk", "generation_id": generation, "chunk_index": index, "start_frame": start, "frames": frames,
            "audio_limit": self._audio_limit(),
        }  # fmt: skip

    def _wait_for_credit(self) -> bool:
        self._asking = False
        self._credit.acquire()
        self._asking = True
        return not self._closing.is_set()

    def _room(self) -> int:
        return max(self.session.room or 0, 0)

    def _audio_limit(self) -> int:
        """Samples in all, at the client's rate, that it may have sent by now."""
        return self._received + self._room() * self.opened.sample_rate // SAMPLE_RATE

    async def _send(self, about: dict[str, Any], data: bytes | None = None) -> None:
        if data is not None:
            about |= {"bytes": len(data)}
        if about["type"] in ("session.opened", "interrupted"):
            about |= {"audio_limit": self._audio_limit()}
        async with self._sending:  # the bytes follow their message
            await self.socket.send_json(about | {"session_id": self.id})
            if data is not None:
                await self.socket.send_bytes(data)

    async def _say_goodbye(self, end: Ended) -> None:
        """The last messages, if anybody is there to read them."""
        if self.socket.application_state != WebSocketState.CONNECTED:
            return
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                if end.sentence is not None:
                    await self._send({"type": "error", "code": end.reason, "message": end.sentence})
                await self.socket.send_json({"type": "session.ended", "reason": end.reason, "session_id": self.id})
                await self.socket.close(end.code, end.reason)
        except (TimeoutError, RuntimeError, WebSocketDisconnect, ConnectionError):
            pass
