"""Sound files to waveforms, and loudness (ITU-R BS.1770)."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import numpy as np
import soxr
from av import AudioResampler
from av.container import InputContainer

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.errors import InputError
from avatar_rt.media._open import check_complete, decode, open_media

MIN_SECONDS = 0.2
TARGET_LUFS = -16.0
_MAX_GAIN_DB = 40.0  # so that the hiss of an almost silent file is not raised to speech level
_GAP_SECONDS = 0.1  # a hole in the time stamps longer than this is silence; a shorter one is rounding


@dataclass(frozen=True)
class Speech:
    """Speech as the engine hears it, and the user's own sound, untouched.

    Attributes:
        samples: float32 [S], mono, at ``rate``; full scale is 1.
        rate: Samples per second of ``samples``.
        original: float32 [S0, channels] at ``original_rate``.
        original_rate: The file's own rate.
        path: Where it came from.
    """

    samples: np.ndarray
    rate: int
    original: np.ndarray
    original_rate: int
    path: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def read_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int = SAMPLE_RATE,
    max_seconds: float | None = None,
    min_seconds: float = MIN_SECONDS,
) -> Speech:
    """Read the sound of a wav, flac, mp3, m4a, ogg, or video file.

    Args:
        path: The file.
        sample_rate: Rate of ``samples`` in the result.
        max_seconds: Read no more than this.
        min_seconds: Refuse a shorter sound.

    Raises: InputError on a file without sound, a damaged or too short one, or samples that are not finite.
    """
    with open_media(path, "a sound file") as container:
        original, rate, start = decode_audio(container, path, max_seconds=max_seconds)
        if max_seconds is None or len(original) < int(max_seconds * rate):
            check_complete(container, container.streams.audio[0], start + len(original) / rate, path)
    if not len(original):
        raise InputError(f"{path}: expected a sound file, got one whose sound has no samples")
    seconds = len(original) / rate
    if seconds < min_seconds:
        raise InputError(f"{path}: expected at least {min_seconds:g} s of sound, got {seconds:.3f} s")
    return Speech(to_mono(original, rate, sample_rate), sample_rate, original, rate, str(path))


def decode_audio(
    container: InputContainer, path: str | os.PathLike[str], *, max_seconds: float | None = None
) -> tuple[np.ndarray, int, float]:
    """The first sound stream of an open file: (float32 [S, channels], rate, time of the first sample in seconds).

    Holes in the time stamps are filled with silence; S may be 0. Raises InputError when the file has no sound stream,
    or one that is damaged or not finite.
    """
    if not container.streams.audio:
        raise InputError(f"{path}: expected a sound file, got a file with no sound in it")
    stream = container.streams.audio[0]
    rate = stream.codec_context.sample_rate
    convert = AudioResampler(format="flt")  # packed float at the stream's own rate and layout
    parts: list[np.ndarray] = []
    start, length = 0.0, 0
    limit = None if max_seconds is None else round(max_seconds * rate)
    for frame in decode(container, stream, path):
        if frame.sample_rate != rate:
            raise InputError(f"{path}: expected one sample rate throughout, got {rate} and then {frame.sample_rate} Hz")
        time, channels = frame.time, frame.layout.nb_channels
        block = np.concatenate([f.to_ndarray().reshape(-1, channels) for f in convert.resample(frame)])
        if not parts:
            start = time or 0.0
        elif channels != parts[0].shape[1]:
            raise InputError(f"{path}: expected {parts[0].shape[1]} channels throughout, got {channels} later on")
        hole = 0 if time is None else round((time - start) * rate) - length
        if parts and hole > _GAP_SECONDS * rate:
            if limit is not None:
                hole = min(hole, limit - length)
            parts.append(np.zeros((hole, channels), np.float32))
            length += hole
        parts.append(block)
        length += len(block)
        if limit is not None and length >= limit:
            break
    samples = np.concatenate(parts)[:limit] if parts else np.zeros((0, 1), np.float32)
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise InputError(f"{path}: expected finite samples, got {bad} that are NaN or infinite")
    return samples, rate, start


def to_mono(samples: np.ndarray, rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [S, channels] at ``rate`` -> float32 [S'] at ``target_rate``, the mean of the channels."""
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mono if rate == target_rate else soxr.resample(mono, rate, target_rate, quality="VHQ").astype(np.float32)


def loudness(samples: np.ndarray, rate: int) -> float:
    """Integrated loudness of a mono sound in LUFS; -inf for silence. A sound under 0.4 s is one block, ungated."""
    x = np.asarray(samples, np.float64)
    if x.ndim != 1:
        raise InputError(f"samples: expected mono [S], got shape {list(x.shape)}")
    if not len(x) or not np.any(x):
        return -np.inf
    energy = np.concatenate([[0.0], np.cumsum(_k_weight(x, rate) ** 2)])
    block, hop = round(0.4 * rate), round(0.1 * rate)
    starts = np.arange(0, max(len(x) - block, 0) + 1, hop)
    power = (energy[np.minimum(starts + block, len(x))] - energy[starts]) / min(block, len(x))
    kept = power[_lufs(power) > -70.0]
    if not len(kept):
        return -np.inf
    return float(_lufs(kept[_lufs(kept) > _lufs(kept.mean()) - 10.0].mean()))


def normalise_loudness(samples: np.ndarray, rate: int, target: float = TARGET_LUFS) -> np.ndarray:
    """Scale a mono sound to ``target`` LUFS.

    Silence comes back as it is, and no sound is raised by more than 40 dB. Peaks may pass 1: this is what the speech
    encoder hears, not what is written to a file.

    Args:
        samples: float32 [S].
        rate: Samples per second.
        target: In LUFS.

    Returns: float32 [S].
    """
    measured = loudness(samples, rate)
    if not np.isfinite(measured):
        return np.asarray(samples, np.float32).copy()
    gain = min(target - measured, _MAX_GAIN_DB)
    return (np.asarray(samples, np.float64) * 10 ** (gain / 20)).astype(np.float32)


class LiveLoudness:
    """Brings a source that is still going on, such as a microphone, to ``target`` LUFS with what was heard so far.

    The gain follows the gated loudness (as ``loudness`` gates) of the last ``window`` seconds, is set anew ten times a
    second and goes there in a ramp. Samples are answered one for one and at once, and do not depend on the pieces in
    which they come. The first 0.4 s, and silence until then, come back as they are; silence after it keeps the gain.

    Args:
        rate: Samples per second, a multiple of 10.
        target: In LUFS.
        window: Seconds that are remembered.
    """

    def __init__(self, rate: int = SAMPLE_RATE, target: float = TARGET_LUFS, window: float = 10.0) -> None:
        if rate % 10:
            raise InputError(f"rate: expected a multiple of 10, got {rate}")
        self.rate, self.target = rate, target
        self._hop = rate // 10
        self._heard = np.zeros(0, np.float32)  # the last 0.5 s before this hop and what there is of it
        self._at = 0  # samples of this hop that have come
        self._hops = 0
        self._power: deque[float] = deque(maxlen=round(window * 10))  # of blocks of 0.4 s, one per hop
        self._gain = self._next = 1.0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """float32 [S] -> float32 [S]. Raises InputError on another shape."""
        x = np.asarray(samples, np.float32)
        if x.ndim != 1:
            raise InputError(f"samples: expected mono [S], got shape {list(x.shape)}")
        out, done = np.empty_like(x), 0
        while done < len(x):
            n = min(self._hop - self._at, len(x) - done)
            part = x[done : done + n]
            ramp = (np.arange(self._at, self._at + n) + 1) / self._hop
            out[done : done + n] = part * (self._gain + (self._next - self._gain) * ramp)
            self._heard = np.concatenate([self._heard, part])
            self._at, done = self._at + n, done + n
            if self._at == self._hop:
                self._measure()
        return out

    def _measure(self) -> None:
        """A hop is complete: the gain that the next one goes to."""
        self._heard = self._heard[-5 * self._hop :]
        self._at, self._hops, self._gain = 0, self._hops + 1, self._next
        if self._hops >= 4:
            block = _k_weight(self._heard, self.rate)[-4 * self._hop :]  # the filter's start is left out
            self._power.append(float(np.mean(block**2)))
        power = np.array(self._power)
        kept = power[_lufs(power) > -70.0] if len(power) else power
        if len(kept):
            measured = float(_lufs(kept[_lufs(kept) > _lufs(kept.mean()) - 10.0].mean()))
            self._next = 10 ** (min(self.target - measured, _MAX_GAIN_DB) / 20)


def _lufs(power: np.ndarray | float) -> np.ndarray:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def _k_weight(x: np.ndarray, rate: int) -> np.ndarray:
    """The K filter (a high shelf, then a high pass) in the frequency domain; half a second of zeros takes its tail."""
    n = len(x) + rate // 2
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(n))
    response = np.ones_like(z)
    for b, a in _k_filters(rate):
        response *= (b[0] + b[1] * z + b[2] * z * z) / (a[0] + a[1] * z + a[2] * z * z)
    return np.fft.irfft(np.fft.rfft(x, n) * response, n)[: len(x)]


def _k_filters(rate: int) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """(numerator, denominator) of both sections at any rate, from the analogue prototypes behind the 48 kHz tables."""
    k, q = np.tan(np.pi * 1681.974450955533 / rate), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    shelf = (
        (high + band * k / q + k * k, 2 * (k * k - high), high - band * k / q + k * k),
        (1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k),
    )
    k, q = np.tan(np.pi * 38.13547087602444 / rate), 0.5003270373238773
    a = (1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k)
    # The standard leaves the high pass with the numerator 1, -2, 1 at 48 kHz: its gain is that of a[0] = 1.
    return [shelf, ((a[0], -2 * a[0], a[0]), a)]
