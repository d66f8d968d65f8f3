"""One stream: its sound, its state, and the loop that makes frames of them, on one screen."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
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
from avatar_rt.pipeline.reference import ReferenceCache, ReferenceContext, encode_reference, pack_cache
from avatar_rt.pipeline.schedule import make_schedule
from avatar_rt.runtime.trace import stage


@dataclass(frozen=True)
class Reference:
    """A prepared person: context (level 1), K/V of every block (level 2), and the clip's own scene.

    Attributes:
        frames: uint8 [F, height, width, 3] the face-centred crops that were encoded.
        weights_hash: The weights that the cache belongs to.
    """

    context: ReferenceContext
    cache: ReferenceCache
    scene: Scene
    frames: np.ndarray
    weights_hash: str


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
        self._samples = np.zeros(0, np.float32)
        self._ended = False
        self._cancelled = threading.Event()

    def push_audio(self, samples: np.ndarray) -> None:
        """Appends speech: fp32 [S], 16 kHz mono, at about -16 LUFS."""
        if self._ended:
            raise InputError("push_audio: the sound of this session has already ended")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise InputError(f"push_audio: expected finite mono samples [S], got shape {list(samples.shape)}")
        self._samples = np.concatenate([self._samples, samples.astype(np.float32)])

    def end_audio(self) -> None:
        """Says that no more sound comes: what is left is generated to its end."""
        self._ended = True

    def close(self) -> None:
        """Stops generation within one step."""
        self._cancelled.set()

    @property
    def total_frames(self) -> int:
        """Frames that the sound pushed so far lasts, at 25 fps."""
        return math.ceil(len(self._samples) / SAMPLES_PER_FRAME)

    def _window(self, first: int, last: int) -> Tensor:
        """Sound of frames first..last with the speech encoder's context, silence where there is none."""
        left, right = self.engine.speech.context
        low, high = first * SAMPLES_PER_FRAME - left, (last + 1) * SAMPLES_PER_FRAME + right
        wave = np.zeros(high - low, np.float32)
        part = self._samples[max(low, 0) : max(high, 0)]
        wave[max(-low, 0) : max(-low, 0) + len(part)] = part
        return torch.from_numpy(wave)[None].to(self.engine.device)

    @torch.inference_mode()
    def frames(self) -> Iterator[np.ndarray]:
        """Yields frames uint8 [n, H, W, 3] chunk by chunk while the pushed sound lasts."""
        engine, cfg, per = self.engine, self.engine.config, self.engine.config.dit.audio_per_latent
        state, decoder, index, emitted = ChunkState(), (), 0, 0
        while emitted < self.total_frames and not self._cancelled.is_set():
            plan = self.schedule.plan(index)
            first, last = max(per * (plan.start - 1) + 1, 0), per * (plan.start + plan.latents - 1)
            needed = (last + 1) * SAMPLES_PER_FRAME + engine.speech.context[1]
            if len(self._samples) < needed and not self._ended:
                return
            with stage("speech"):
                audio = engine.speech(self._window(first, last), has_context=True)
            given = Conditions(self.scene, audio, self.text, self.empty_text)
            result = denoise_chunk(
                engine.dit, cfg, self.schedule, plan, state, self._reference, given, self._cancelled.is_set
            )
            if result is None:
                return
            chunk, state = result
            pictures, decoder = decode_chunk(engine.vae, chunk, decoder or None, cfg.output_scale)
            frames = pictures.frames[: self.total_frames - emitted].cpu().numpy()
            emitted, index = emitted + len(frames), index + 1
            yield frames

    def _reference(self) -> ReferenceCache:
        return self._cache or encode_reference(self.engine.dit, self.reference.context)
