"""Frames and sound to an h264 + aac file, all or nothing."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import soxr
from av import VideoStream
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from avatar_rt.config import FPS
from avatar_rt.errors import InputError

EXTENSIONS = (".mp4", ".mov", ".mkv")
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AAC_BLOCK = 1024
X264 = {"threads": "1", "x264-params": "mbtree=0"}
"""For the same bytes every time: x264's macroblock tree reads memory that nobody wrote, and one fragment in some
hundred comes out otherwise; and what it makes depends on the number of threads."""
_OPTIONS = {"crf": "18", "preset": "veryfast"}


def check_output(path: str | os.PathLike[str], extensions: tuple[str, ...] = EXTENSIONS) -> Path:
    """Prove, before any work is done, that a file of such an extension can be written here.

    Raises: InputError on an unknown extension, a directory, a missing or an unwritable folder.
    """
    file = Path(path)
    if file.suffix.lower() not in extensions:
        got = f"the extension {file.suffix!r}" if file.suffix else "no extension"
        raise InputError(f"{file}: expected an output ending in {', '.join(extensions)}, got {got}")
    if file.is_dir():
        raise InputError(f"{file}: expected a file name for the output, got a directory")
    if not file.parent.is_dir():
        raise InputError(f"{file}: expected an output in an existing folder, but there is no folder {file.parent}")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as e:
        raise InputError(f"{file}: the output cannot be written there ({e.strerror})") from None
    return file


class VideoWriter:
    """A context manager that writes one video; the file appears, complete, when the block ends without an exception.

    The same frames and sound give the same bytes.

    Args:
        path: Ends in .mp4, .mov or .mkv.
        size: (height, width), both even.
        fps: Frames per second.
        audio: (float32 [S] or [S, channels], rate), sample 0 at frame 0; what goes on after the last frame is cut.

    Raises: InputError on arguments outside of the above, on an output that cannot be written, and at the end of the
        block when no frame was given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: float | Fraction = FPS,
        *,
        audio: tuple[np.ndarray, int] | None = None,
    ) -> None:
        self.path = check_output(path)
        self.size = check_size(size)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.num_frames = 0
        self._given = None if audio is None else (_check_sound(audio[0]), audio[1])
        self._sound: SoundTrack | None = None
        self._container: OutputContainer | None = None

    def __enter__(self) -> VideoWriter:
        # The temporary name keeps the extension, by which the container format is chosen.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}.", suffix=self.path.suffix)
        os.close(handle)
        self._part = Path(name)
        try:
            self._open()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 [n, H, W, 3] or [H, W, 3] RGB of the writer's size."""
        frames = check_frames(frames[None] if frames.ndim == 3 else frames, self.size)
        for rgb in frames:
            self._mux(self._video.encode(to_picture(rgb, self.num_frames, self.fps)))
            self.num_frames += 1
            if self._sound is not None:
                self._mux(self._sound.encode(self.num_frames / self.fps))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except av.error.FFmpegError as e:
            raise InputError(f"{self.path}: the output could not be written ({e.strerror})") from None
        finally:
            self._discard()

    def _open(self) -> None:
        # bitexact: no random identifiers and no dates in the file.
        self._container = av.open(f"file:{self._part}", "w", container_options={"fflags": "+bitexact"})
        self._video = add_video(self._container, self.size, self.fps, _OPTIONS)
        if self._given is not None:
            samples, rate = self._given
            self._sound = SoundTrack(self._container, samples.shape[1], rate)
            self._sound.add(samples, last=True)

    def _mux(self, packets: list[av.Packet]) -> None:
        assert self._container is not None, "write is for the inside of the with block"
        try:
            self._container.mux(packets)
        except av.error.FFmpegError as e:
            raise InputError(f"{self.path}: the output could not be written ({e.strerror})") from None

    def _finish(self) -> None:
        if not self.num_frames:
            raise InputError(f"{self.path}: expected at least one frame to write, got none")
        if self._sound is not None:
            self._mux(self._sound.encode(self.num_frames / self.fps, last=True))
        self._mux(self._video.encode())
        assert self._container is not None
        self._container.close()
        self._container = None
        publish(self._part, self.path)

    def _discard(self) -> None:
        """Close what is open and remove the temporary file, if it is still there."""
        if self._container is not None:
            with contextlib.suppress(av.error.FFmpegError):  # the file goes anyway; the first error is the one to show
                self._container.close()
            self._container = None
        self._part.unlink(missing_ok=True)


def publish(part: Path, path: Path) -> None:
    """Puts a finished temporary file in its place, with the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o666 & ~umask)  # mkstemp's files are for the owner only
    part.replace(path)


# ---- what every video file here is made of ---------------------------------------------------------------------------


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Raises InputError unless (height, width) are even."""
    height, width = size
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise InputError(f"size: expected an even height and width, got {height}x{width}")
    return size


def check_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Raises InputError unless frames are uint8 [n, H, W, 3] of the size."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*size, 3):
        expected = f"uint8 [n, {size[0]}, {size[1]}, 3]"
        raise InputError(f"frames: expected {expected}, got {frames.dtype} {list(frames.shape)}")
    return frames


def add_video(container: OutputContainer, size: tuple[int, int], fps: Fraction, options: dict[str, str]) -> VideoStream:
    """An h264 stream in BT.709 colours for pictures of the size; ``options`` are the encoder's, besides ``X264``."""
    video = container.add_stream("libx264", rate=fps, options=X264 | options)
    video.height, video.width = size
    video.pix_fmt = "yuv420p"
    context = video.codec_context
    context.time_base = 1 / fps
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return video


def to_picture(rgb: np.ndarray, index: int, fps: Fraction) -> av.VideoFrame:
    """uint8 [H, W, 3] RGB as the encoder takes it, shown at ``index`` / ``fps``."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1,
        interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )  # fmt: skip
    frame.pts, frame.time_base = index, 1 / fps
    return frame


class SoundTrack:
    """An aac stream of a container, fed with sound of any rate in pieces; the same packets however it is cut.

    Args:
        channels: Of the sound; more than two become mono.
        rate: Of the sound; one that aac does not know becomes 48 kHz.
    """

    def __init__(self, container: OutputContainer, channels: int, rate: int) -> None:
        self.channels = channels if channels <= 2 else 1
        self.rate, self._resample = rate, None
        if rate not in _AAC_RATES:
            self.rate, self._resample = 48_000, soxr.ResampleStream(rate, 48_000, self.channels, "float32", "VHQ")
        self._layout = "mono" if self.channels == 1 else "stereo"
        self.stream = container.add_stream("aac", rate=self.rate, layout=self._layout)
        self.stream.bit_rate = 96_000 * self.channels
        self._waiting = np.zeros((0, self.channels), np.float32)
        self._sent = 0

    def add(self, samples: np.ndarray, *, last: bool = False) -> None:
        """Appends float32 [S, channels] at the given rate."""
        sound = samples.mean(axis=1, keepdims=True) if samples.shape[1] > 2 else samples
        if self._resample is not None:
            sound = self._resample.resample_chunk(np.ascontiguousarray(sound), last=last).reshape(-1, self.channels)
        self._waiting = np.concatenate([self._waiting, sound])

    def encode(self, seconds: Fraction | float, *, last: bool = False) -> list[av.Packet]:
        """Packets of the sound up to a time, in whole blocks; ``last``: the rest up to there, and nothing follows."""
        due = min(math.ceil(seconds * self.rate) - self._sent, len(self._waiting))
        packets, at = [], 0
        while at + (1 if last else _AAC_BLOCK) <= due:
            block = np.ascontiguousarray(self._waiting[at : min(at + _AAC_BLOCK, due)].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self._sent + at, Fraction(1, self.rate)
            packets += self.stream.encode(frame)
            at += block.shape[1]
        self._waiting, self._sent = self._waiting[at:], self._sent + at
        return packets + (self.stream.encode() if last else [])


def _check_sound(samples: np.ndarray) -> np.ndarray:
    """float32 [S] or [S, channels] -> [S, channels]. Raises InputError on another shape or samples not finite."""
    sound = np.asarray(samples, np.float32)
    sound = sound[:, None] if sound.ndim == 1 else sound
    if sound.ndim != 2 or not sound.shape[0] or not 1 <= sound.shape[1] <= 64:
        raise InputError(f"audio: expected [S] or [S, channels] with S > 0, got {list(np.shape(samples))}")
    if not np.isfinite(sound).all():
        raise InputError("audio: expected finite samples, got NaN or infinity")
    return sound
