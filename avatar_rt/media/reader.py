"""Users' videos and pictures to upright RGB frames at a constant rate, with the sound that belongs to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation

from avatar_rt.config import FPS, SAMPLE_RATE
from avatar_rt.errors import InputError
from avatar_rt.media._open import check_complete, check_file, decode, open_media
from avatar_rt.media.audio import decode_audio, to_mono

_Path = str | os.PathLike[str]
_MAX_HOLD = 60.0  # seconds one picture may stay on before its time stamp counts as nonsense
_MAX_SIDE = 16_384
_UNTAGGED = 2  # FFmpeg's number for a colour space that is not stated


@dataclass(frozen=True)
class VideoClip:
    """A video in memory.

    Attributes:
        frames: uint8 [F, H, W, 3] RGB, upright, square pixels; frame i shows time i / fps.
        fps: Frames per second.
        audio: float32 [round(F * 16000 / fps)] 16 kHz mono, sample 0 at frame 0; None for a video without sound.
        path: Where it came from.
    """

    frames: np.ndarray
    fps: float
    audio: np.ndarray | None
    path: str


def read_video(
    path: _Path, *, fps: float = FPS, max_seconds: float | None = None, max_side: int | None = None
) -> VideoClip:
    """Read a whole video. A minute of 640x480 is 1.4 GB here: use ``max_seconds``, ``max_side``, or ``iter_frames``.

    Args, errors: those of ``iter_frames``; also InputError when the video's sound does not decode.
    """
    frames = list(iter_frames(path, fps=fps, max_seconds=max_seconds, max_side=max_side))
    video = np.stack(frames)
    return VideoClip(video, fps, read_video_audio(path, num_frames=len(video), fps=fps), str(path))


def iter_frames(
    path: _Path, *, fps: float = FPS, max_seconds: float | None = None, max_side: int | None = None
) -> Iterator[np.ndarray]:
    """Stream a video's frames, uint8 [H, W, 3] RGB, one every 1 / ``fps`` s, in constant memory.

    Frame i is the picture whose presentation time is nearest to i / fps after the first picture's; so any frame rate,
    and a variable one, keeps its timing. Rotation and mirror tags are applied and pixels made square.

    Args:
        path: Any video file. The first video stream that is not a cover picture is read.
        fps: Frames per second to give.
        max_seconds: Stop after this much.
        max_side: Scale down, keeping the shape, until no side is longer than this.

    Raises: InputError on a file that is not a video, is damaged, breaks off, or has no frame.
    """
    limit = None if max_seconds is None else max(1, round(max_seconds * fps))
    _refuse_picture(path)
    with open_media(path, "a video") as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        layout = None
        for count, frame in enumerate(_at_rate(container, stream, path, fps)):
            if limit is not None and count >= limit:
                return
            layout = layout or _layout(stream, frame, max_side, path)
            yield _upright_rgb(frame, layout)


def read_video_audio(path: _Path, *, num_frames: int, fps: float = FPS) -> np.ndarray | None:
    """The sound under ``num_frames`` frames of a video: float32 [round(num_frames * 16000 / fps)] mono, or None.

    Sample 0 sounds when frame 0 shows; a sound that starts late or ends early is filled up with silence.
    """
    with open_media(path, "a video") as container:
        if not container.streams.audio:
            return None
        stream = _video_stream(container, path)
        video_start = float((stream.start_time or 0) * (stream.time_base or 0))
    with open_media(path, "a video") as container:
        samples, rate, start = decode_audio(container, path, max_seconds=num_frames / fps + 5.0)
    shift = round((video_start - start) * rate)
    samples = samples[shift:] if shift >= 0 else np.pad(samples, ((-shift, 0), (0, 0)))
    if not len(samples):  # declared but empty: the video is silent
        return None
    mono = to_mono(samples, rate)[: round(num_frames * SAMPLE_RATE / fps)]
    return np.pad(mono, (0, round(num_frames * SAMPLE_RATE / fps) - len(mono)))


def read_image(path: _Path) -> np.ndarray:
    """Read a picture, turned upright by its EXIF tag: uint8 [H, W, 3] RGB. Raises InputError when it cannot be read."""
    file = check_file(path, "a picture")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the sentence below says it
    try:
        image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise InputError(f"{path}: expected a picture (png, jpeg, webp, ...), got a file that cannot be read as one")
    return np.ascontiguousarray(image[..., ::-1])


def _refuse_picture(path: _Path) -> None:
    file = check_file(path, "a video")
    if file.suffix.lower() != ".gif" and cv2.haveImageReader(str(file)):
        raise InputError(f"{path}: expected a video, got a picture")


def _video_stream(container: InputContainer, path: _Path) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    other = "only sound" if container.streams.audio else "neither video nor sound"
    raise InputError(f"{path}: expected a video, got a file with no video stream ({other})")


def _timed(
    container: InputContainer, stream: av.VideoStream, path: _Path
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(time, duration, frame) with time rising strictly; frames out of order or without a place are dropped."""
    step = 1.0 / float(stream.average_rate or stream.guessed_rate or FPS)
    last = None
    for frame in decode(container, stream, path):
        time = frame.time if frame.time is not None else (0.0 if last is None else last + step)
        if last is not None and time <= last:
            continue
        if last is not None and time - last > _MAX_HOLD:
            raise InputError(f"{path}: the file is damaged: {time - last:.0f} s pass between two of its frames")
        last = time
        yield time, float(frame.duration * frame.time_base) if frame.duration else step, frame


def _at_rate(container: InputContainer, stream: av.VideoStream, path: _Path, fps: float) -> Iterator[av.VideoFrame]:
    """The frame nearest to each multiple of 1 / fps. Needs one frame of look-ahead."""
    count, start, held = 0, 0.0, None
    for time, duration, frame in _timed(container, stream, path):
        if held is None:
            start = time
        else:
            while count / fps < (held[0] + time) / 2 - start + 1e-6:  # the earlier one of two equally near
                yield held[2]
                count += 1
        held = (time, duration, frame)
    if held is None:
        raise InputError(f"{path}: expected a video, got one with no frames")
    end = held[0] + min(held[1], _MAX_HOLD)
    check_complete(container, stream, end, path)
    total = max(1, round((end - start) * fps))
    for _ in range(count, total):
        yield held[2]


class _Layout(NamedTuple):
    """How a decoded frame becomes an upright one: scaled to width x height, transposed, then flipped."""

    width: int
    height: int
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def _layout(stream: av.VideoStream, frame: av.VideoFrame, max_side: int | None, path: _Path) -> _Layout:
    """From the first frame and for all: square pixels, no side over ``max_side``, and the display matrix.

    Asking every frame for its matrix would tie each to its side data in a cycle, and hundreds of them would wait for
    the garbage collector.
    """
    width, height = frame.width, frame.height
    if max(width, height) > _MAX_SIDE:
        raise InputError(f"{path}: expected at most {_MAX_SIDE} pixels a side, got {width}x{height}")
    aspect = float(stream.sample_aspect_ratio or 1.0)
    if 0.2 < aspect < 5.0:  # outside of this the tag is nonsense
        width = round(width * aspect)
    scale = min(1.0, (max_side or _MAX_SIDE) / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Layout(width, height)
    # Up to a shift, the picture's column is a x + c y and its row b x + d y, in quarter turns, perhaps mirrored.
    a, b, _, c, d = (int(v) for v in np.frombuffer(matrix, np.int32)[:5])  # type: ignore[call-overload]
    if abs(a) < abs(b):
        return _Layout(width, height, transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    return _Layout(width, height, flip_rows=d < 0, flip_columns=a < 0)


def _upright_rgb(frame: av.VideoFrame, layout: _Layout) -> np.ndarray:
    colours = frame.colorspace
    if colours == _UNTAGGED and frame.format.name.startswith("yuv"):
        colours = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601  # what players assume
    smaller = layout.width * layout.height < 0.7 * frame.width * frame.height
    how = Interpolation.AREA if smaller else Interpolation.BICUBIC
    rgb = frame.to_ndarray(
        format="rgb24", width=layout.width, height=layout.height, src_colorspace=colours, threads=1,
        interpolation=how | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
    )  # fmt: skip
    if layout.transpose:
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: -1 if layout.flip_rows else 1, :: -1 if layout.flip_columns else 1])
