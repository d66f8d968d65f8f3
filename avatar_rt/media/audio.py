"""Sound files to waveforms, and loudness (ITU-R BS.1770)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

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


def iter_audio(
    container: InputContainer, path: str | os.PathLike[str], *, max_seconds: float | None = None
) -> Iterator[tuple[np.ndarray, int, float]]:
    """The first sound stream of an open file, block by block: (float32 [S, channels], rate, time of the file's start).

    Holes in the time stamps are filled with silence. Raises InputError when the file has no sound stream, or one that
    is damaged, changes on the way or is not finite.
    """
    if not container.streams.audio:
        raise InputError(f"{path}: expected a sound file, got a file with no sound in it")
    stream = container.streams.audio[0]
    rate = stream.codec_context.sample_rate
    convert = AudioResampler(format="flt")  # packed float at the stream's own rate and layout
    start, length, width = 0.0, 0, 0
    limit = None if max_seconds is None else round(max_seconds * rate)
    for frame in decode(container, stream, path):
        if frame.sample_rate != rate:
            raise InputError(f"{path}: expected one sample rate throughout, got {rate} and then {frame.sample_rate} Hz")
        time, channels = frame.time, frame.layout.nb_channels
        block = np.concatenate([f.to_ndarray().reshape(-1, channels) for f in convert.resample(frame)])
        if not width:
            start, width = time or 0.0, channels
        elif channels != width:
            raise InputError(f"{path}: expected {width} channels throughout, got {channels} later on")
        if not np.isfinite(block).all():
            bad = int((~np.isfinite(block)).sum())
            raise InputError(f"{path}: expected finite samples, got {bad} that are NaN or infinite in one block")
        hole = 0 if time is None else round((time - start) * rate) - length
        if not length or hole <= _GAP_SECONDS * rate:
            hole = 0
        silence = (np.zeros((min(rate, hole - at), channels), np.float32) for at in range(0, hole, rate))
        for piece in chain(silence, [block]):  # a long hole comes in pieces too
            piece = piece if limit is None else piece[: limit - length]
            length += len(piece)
            yield piece, rate, start
            if limit is not None and length >= limit:
                return


def decode_audio(
    container: InputContainer, path: str | os.PathLike[str], *, max_seconds: float | None = None
) -> tuple[np.ndarray, int, float]:
    """All of ``iter_audio`` in one piece: (float32 [S, channels], rate, time of the first sample); S may be 0."""
    found = list(iter_audio(container, path, max_seconds=max_seconds))
    if not found:
        return np.zeros((0, 1), np.float32), container.streams.audio[0].codec_context.sample_rate, 0.0
    return np.concatenate([block for block, _, _ in found]), *found[0][1:]


def to_mono(samples: np.ndarray, rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [S, channels] at ``rate`` -> float32 [S'] at ``target_rate``, the mean of the channels."""
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mono if rate == target_rate else soxr.resample(mono, rate, target_rate, quality="VHQ").astype(np.float32)


class LoudnessMeter:
    """Integrated loudness of a mono sound that comes in pieces; the same bits however it is cut.

    Keeps one number per 0.1 s: an hour takes 0.3 MB.
    """

    def __init__(self, rate: int) -> None:
        self.hop = round(0.1 * rate)
        self._tail = rate // 2  # the K filter's ring has died away after half a second, to the last bit of a double
        self._step = 100 * self.hop  # samples filtered at once
        self._response = _k_response(rate, _fft_length(self._tail + self._step))
        self._past = np.zeros(self._tail)
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._hops: list[np.ndarray] = []

    def add(self, samples: np.ndarray) -> None:
        """Appends mono samples [S]."""
        self._waiting.append(np.asarray(samples, np.float64))
        self._count += len(samples)
        if self._count >= self._step:
            x = np.concatenate(self._waiting)
            whole = len(x) - len(x) % self._step
            for start in range(0, whole, self._step):
                self._past, y = self._filter(self._past, x[start : start + self._step])
                self._hops.append(np.square(y).reshape(-1, self.hop).sum(1))
            self._waiting, self._count = [x[whole:]], len(x) - whole

    def _filter(self, past: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Overlap-save: what the samples become, given the half second before them; and the next half second."""
        whole = np.concatenate([past, x])
        n = 2 * (len(self._response) - 1)
        y = np.fft.irfft(np.fft.rfft(whole, n) * self._response, n)
        return whole[-self._tail :], y[self._tail : len(whole)]

    @property
    def lufs(self) -> float:
        """Loudness of all that came so far; -inf for silence. A sound under 0.4 s is one block, ungated by others."""
        rest = np.concatenate([*self._waiting, np.zeros(0)])
        rest = np.square(self._filter(self._past, rest)[1]) if len(rest) else rest
        whole = len(rest) - len(rest) % self.hop
        hops = np.concatenate([*self._hops, rest[:whole].reshape(-1, self.hop).sum(1)])
        if len(hops) < 4:
            length = len(hops) * self.hop + len(rest) - whole
            power = np.array([(hops.sum() + rest[whole:].sum()) / length]) if length else np.zeros(0)
        else:
            power = (hops[:-3] + hops[1:-2] + hops[2:-1] + hops[3:]) / (4 * self.hop)
        kept = power[_lufs(power) > -70.0]
        if not len(kept):
            return -np.inf
        return float(_lufs(kept[_lufs(kept) > _lufs(kept.mean()) - 10.0].mean()))


def loudness(samples: np.ndarray, rate: int) -> float:
    """Integrated loudness of a mono sound in LUFS; -inf for silence. A sound under 0.4 s is one block, ungated."""
    x = np.asarray(samples)
    if x.ndim != 1:
        raise InputError(f"samples: expected mono [S], got shape {list(x.shape)}")
    meter = LoudnessMeter(rate)
    meter.add(x)
    return meter.lufs


def loudness_gain(measured: float, target: float = TARGET_LUFS) -> float:
    """Factor that brings a sound of so many LUFS to ``target``; 1 for silence, and never more than 40 dB."""
    return 10 ** (min(target - measured, _MAX_GAIN_DB) / 20) if np.isfinite(measured) else 1.0


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
    gain = loudness_gain(loudness(samples, rate), target)
    return (np.asarray(samples, np.float64) * gain).astype(np.float32)


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
    """A whole sound through the K filter; half a second of zeros takes its tail."""
    n = len(x) + rate // 2
    return np.fft.irfft(np.fft.rfft(x, n) * _k_response(rate, n), n)[: len(x)]


def _k_response(rate: int, n: int) -> np.ndarray:
    """The K filter (a high shelf, then a high pass) at the frequencies of a real FFT of length ``n``."""
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(n))
    response = np.ones_like(z)
    for b, a in _k_filters(rate):
        response *= (b[0] + b[1] * z + b[2] * z * z) / (a[0] + a[1] * z + a[2] * z * z)
    return response


def _fft_length(least: int) -> int:
    """The next even number with no factor over 5, for which an FFT is quick."""
    n = least + least % 2
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 2


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
