"""A speech file of any length, piece by piece: what the model hears, and the user's own sound beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import soxr

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.errors import InputError
from avatar_rt.media._open import check_complete, open_media
from avatar_rt.media.audio import MIN_SECONDS, LoudnessMeter, iter_audio, loudness_gain

PIECE_SECONDS = 10.0


class _ToMono:
    """The mean of the channels at 16 kHz, piece by piece: the bits of ``audio.to_mono`` over the whole."""

    def __init__(self, rate: int) -> None:
        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "VHQ")

    def __call__(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
        return mono if self._stream is None else self._stream.resample_chunk(mono, last=last)


class SpeechFile:
    """A sound file read twice and never held: once to measure it, then once per ``pieces``.

    Attributes:
        num_samples: Of the mono sound at 16 kHz.
        gain: Factor that brings it to -16 LUFS.
        rate, channels: Of the file's own sound.

    Raises: InputError on a file without sound, a damaged, broken off or too short one, or samples that are not finite.
    """

    def __init__(self, path: str | os.PathLike[str], *, seconds: float | None = None) -> None:
        if seconds is not None and not seconds > 0:
            raise InputError(f"seconds: expected more than 0, got {seconds}")
        self.path, self._seconds = path, seconds
        meter = LoudnessMeter(SAMPLE_RATE)
        self.num_samples = length = self.channels = self.rate = 0
        begin, convert = 0.0, None
        with open_media(path, "a sound file") as container:
            for block, rate, start in iter_audio(container, path):
                if convert is None:
                    convert, begin = _ToMono(rate), start
                    self.rate, self.channels = rate, block.shape[1]
                length += len(block)
                self._measure(meter, convert(block))
            if convert is None or not length:
                raise InputError(f"{path}: expected a sound file, got one whose sound has no samples")
            self._measure(meter, convert(np.zeros((0, 1), np.float32), last=True))
            check_complete(container, container.streams.audio[0], begin + length / self.rate, path)
        if length / self.rate < MIN_SECONDS:
            raise InputError(f"{path}: expected at least {MIN_SECONDS:g} s of sound, got {length / self.rate:.3f} s")
        self.gain = loudness_gain(meter.lufs)

    def _measure(self, meter: LoudnessMeter, mono: np.ndarray) -> None:
        if self._seconds is not None:
            mono = mono[: max(round(self._seconds * SAMPLE_RATE) - self.num_samples, 0)]
        meter.add(mono)
        self.num_samples += len(mono)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (heard, original): fp32 [S] 16 kHz mono at -16 LUFS and fp32 [S0, channels] at ``rate``.

        Both begin at the file's start and are about ``PIECE_SECONDS`` long; the resampler lets ``heard`` lag a little.
        """
        convert = _ToMono(self.rate)
        most = None if self._seconds is None else round(self._seconds * self.rate)
        left, given, waiting, held = self.num_samples, 0, [], 0

        def heard(samples: np.ndarray, *, last: bool = False) -> np.ndarray:
            mono = convert(samples, last=last)[:left]
            return (mono.astype(np.float64) * self.gain).astype(np.float32)

        with open_media(self.path, "a sound file") as container:
            for block, _, _ in iter_audio(container, self.path):
                waiting.append(block)
                held += len(block)
                if held >= PIECE_SECONDS * self.rate:
                    own = np.concatenate(waiting)
                    mono = heard(own)
                    yield mono, own if most is None else own[: max(most - given, 0)]
                    left, given, waiting, held = left - len(mono), given + held, [], 0
                    if not left:
                        return
        own = np.concatenate(waiting) if waiting else np.zeros((0, self.channels), np.float32)
        yield heard(own, last=True), own if most is None else own[: max(most - given, 0)]
