"""Small videos and sounds that the media tests make for themselves."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"


def numbered(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [F, H, W, 3] whose grey level tells the frame: 3 levels a frame, so it survives compression."""
    return np.broadcast_to(
        (np.arange(num_frames) * 3 % 256)[:, None, None, None], (num_frames, height, width, 3)
    ).astype(np.uint8)


def quadrants(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [H, W, 3]: red, green / blue, white; tells every turn and mirror image apart."""
    picture = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    picture[:h, :w], picture[:h, w:] = (220, 20, 20), (20, 220, 20)
    picture[h:, :w], picture[h:, w:] = (20, 20, 220), (240, 240, 240)
    return picture


def clicks(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """float32 [S, channels]: a 10 ms tone burst every 100 ms, with unequal strengths, to measure delays by."""
    samples = np.zeros((round(seconds * rate), channels), np.float32)
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate // 100) / rate).astype(np.float32)
    for i, start in enumerate(range(0, len(samples) - len(tone), rate // 10)):
        samples[start : start + len(tone)] += (0.2 + 0.5 * ((i * 7) % 5) / 5) * tone[:, None]
    return samples


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    times: list[float] | None = None,
    fps: float = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    turn: dict | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video with PyAV alone; ``times`` gives the frames' presentation times, else they come at ``fps``."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, 12800)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(**turn)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts = round((times[i] if times else i / fps) * 12800)
            frame.time_base = Fraction(1, 12800)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """16-bit PCM from float [S] or [S, channels]."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def write_sound(path: Path, samples: np.ndarray, rate: int, codec: str, sample_format: str = "fltp") -> Path:
    """Float [S, channels] through one of PyAV's sound encoders."""
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        convert = av.AudioResampler(format=stream.format or sample_format, layout=layout, rate=rate, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T, np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for piece in [*convert.resample(frame), *convert.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return path


def delay(a: np.ndarray, b: np.ndarray, reach: int = 400) -> int:
    """By how many samples ``b`` comes after ``a``, from the peak of their correlation."""
    n = min(len(a), len(b))
    middle = a[reach : n - reach]
    scores = [float(middle @ b[reach + d : n - reach + d]) for d in range(-reach, reach + 1)]
    return int(np.argmax(scores)) - reach
