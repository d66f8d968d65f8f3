"""One stream: its sound, its state, and the loop that makes frames of them, on one screen."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from avatar_rt.config import SAMPLES_PER_FRAME, AvatarConfig, SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.decode import decode_chunk
from avatar_rt.pipeline.denoise import ChunkState, Conditions, Scene, denoise_chunk
from avatar_rt.pipeline.reference import ReferenceCache, encode_reference, pack_cache
from avatar_rt.pipeline.schedule import make_schedule
from avatar_rt.prepared import Reference
from avatar_rt.runtime.trace import stage


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


class Models(Protocol):
    """What a session needs of an engine; shared by all sessions and never written to."""

    config: AvatarConfig
    device: torch.device
    dit: VideoRefDiT
    vae: VideoVAE
    speech: SpeechEncoder

    def embed_text(self, prompt: str = "") -> Tensor:
        """[1, S, D] context of a prompt."""
        ...


class Session:
    """One stream: sound goes in, frames come out. Keeps the sound and the state between chunks, and no frame."""

    def __init__(
        self,
        engine: Models,
        reference: Reference,
        scene: Scene,
        prompt: str,
        seed: int,
        sampling: SamplingConfig,
        use_cache: bool,
    ) -> None:
        self.engine, self.reference, self.scene = engine, reference, scene
        cfg = engine.config
        with torch.inference_mode():
            self.empty_text = engine.embed_text()
            self.text = engine.embed_text(prompt) if prompt else self.empty_text
        self.schedule = make_schedule(sampling, cfg.chunk, seed, has_text=bool(prompt))
        self._cache = pack_cache(reference.cache) if use_cache else None
        self._samples = np.zeros(0, np.float32)  # from sample self._first on: what was before, no later chunk needs
        self._first = 0
        self._state = SessionState()
        self._ended = False
        self._cancelled = threading.Event()

    def push_audio(self, samples: np.ndarray) -> None:
        """Appends speech: fp32 [S], 16 kHz mono, at about -16 LUFS."""
        if self._ended:
            raise InputError("push_audio: the sound of this session has already ended")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise InputError(f"push_audio: expected finite mono samples [S], got shape {list(samples.shape)}")
        kept = np.concatenate([self._samples, samples.astype(np.float32)])
        start = max(self._heard(self._state.index)[0], 0)
        self._samples = kept[max(start - self._first, 0) :].copy()
        self._first = max(self._first, min(start, self._first + len(kept)))

    def end_audio(self) -> None:
        """Says that no more sound comes: what is left is generated to its end."""
        self._ended = True

    def close(self) -> None:
        """Stops generation within one step."""
        self._cancelled.set()

    @property
    def total_frames(self) -> int:
        """Frames that the sound pushed so far lasts, at 25 fps."""
        return math.ceil((self._first + len(self._samples)) / SAMPLES_PER_FRAME)

    def _heard(self, index: int) -> tuple[int, int]:
        """Samples that a chunk hears: its frames' own and the speech encoder's context on both sides."""
        plan, per = self.schedule.plan(index), self.engine.config.dit.audio_per_latent
        left, right = self.engine.speech.context
        first, last = max(per * (plan.start - 1) + 1, 0), per * (plan.start + plan.latents - 1)
        return first * SAMPLES_PER_FRAME - left, (last + 1) * SAMPLES_PER_FRAME + right

    def _window(self, low: int, high: int) -> Tensor:
        """Samples low..high, silence where there are none."""
        wave, low, high = np.zeros(high - low, np.float32), low - self._first, high - self._first
        part = self._samples[max(low, 0) : max(high, 0)]
        wave[max(-low, 0) : max(-low, 0) + len(part)] = part
        return torch.from_numpy(wave)[None].to(self.engine.device)

    def state(self) -> SessionState:
        """Where the stream stands after the last chunk yielded."""
        return self._state

    def restore(self, state: SessionState) -> None:
        """Goes on from there. The sound is pushed from its beginning again; frames come from ``state.frames`` on."""
        self._state = state

    @torch.inference_mode()
    def frames(self) -> Iterator[np.ndarray]:
        """Yields frames uint8 [n, H, W, 3] chunk by chunk while the pushed sound lasts; may be called again."""
        engine, cfg = self.engine, self.engine.config
        while self._state.frames < self.total_frames and not self._cancelled.is_set():
            at = self._state
            low, high = self._heard(at.index)
            if self._first + len(self._samples) < high and not self._ended:
                return
            with stage("speech"):
                audio = engine.speech(self._window(low, high), has_context=True)
            given = Conditions(self.scene, audio, self.text, self.empty_text)
            result = denoise_chunk(
                engine.dit, cfg, self.schedule, self.schedule.plan(at.index), at.chunk, self._reference, given,
                self._cancelled.is_set,
            )  # fmt: skip
            if result is None:
                return
            chunk, state = result
            pictures, decoder = decode_chunk(engine.vae, chunk, at.decoder or None, cfg.output_scale)
            frames = pictures.frames[: self.total_frames - at.frames].cpu().numpy()
            self._state = SessionState(at.index + 1, at.frames + len(frames), state, decoder)
            yield frames

    def _reference(self) -> ReferenceCache:
        return self._cache or encode_reference(self.engine.dit, self.reference.context)
