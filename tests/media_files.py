"""Small videos and sounds that the media tests make for themselves."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import cv2
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


def draw_face(
    picture: np.ndarray, x: float, y: float, height: float, skin: tuple[int, int, int] = (214, 170, 140)
) -> None:
    """Draw a head that a face detector takes for one: hairline to chin ``height`` pixels around (x, y), in place."""
    shades = {k: tuple(min(255, round(v * k)) for v in skin) for k in (0.55, 0.75, 0.8, 0.85, 1.0, 1.08)}
    hair, white, iris, lips = (50, 35, 25), (245, 245, 245), (60, 40, 30), (180, 80, 80)
    parts = [(0, -0.12, 0.47, 0.55, hair), (0, 0.55, 0.18, 0.3, shades[0.8]), (0, 1.0, 0.8, 0.4, (60, 70, 110))]
    parts += [(0, 0, 0.38, 0.5, shades[1.0]), (0, -0.42, 0.36, 0.16, hair)]
    for d in (-1, 1):
        parts += [(d * 0.16, -0.1, 0.095, 0.05, shades[0.75]), (d * 0.16, -0.095, 0.075, 0.035, white)]
        parts += [(d * 0.16, -0.095, 0.034, 0.034, iris), (d * 0.16, -0.2, 0.1, 0.02, iris)]
        parts += [(d * 0.05, 0.115, 0.02, 0.012, shades[0.55]), (d * 0.38, -0.02, 0.05, 0.1, shades[0.85])]
    parts += [(0, 0.02, 0.035, 0.12, shades[1.08]), (0, 0.12, 0.07, 0.03, shades[0.85])]
    parts += [(0, 0.26, 0.13, 0.035, lips), (0, 0.26, 0.1, 0.01, hair), (0, 0.33, 0.08, 0.015, shades[0.85])]
    for px, py, a, b, colour in parts:
        centre = (round((x + px * height) * 16), round((y + py * height) * 16))  # OpenCV takes sixteenths of a pixel
        axes = (max(8, round(a * height * 16)), max(8, round(b * height * 16)))
        cv2.ellipse(picture, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA, 4)


def face_video(num_frames: int, faces, height: int = 180, width: int = 240) -> np.ndarray:
    """uint8 [F, H, W, 3]; ``faces(i)`` gives the (x, y, height) of each head in frame i."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(60, 180, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    frames = np.repeat(ground[None], num_frames, 0)
    for i, frame in enumerate(frames):
        for face in faces(i):
            draw_face(frame, *face)
    return frames
