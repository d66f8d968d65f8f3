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
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from avatar_rt.config import FPS
from avatar_rt.errors import InputError

EXTENSIONS = (".mp4", ".mov", ".mkv")
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AAC_BLOCK = 1024
# Two encoder threads: x264's result depends on their number, so it must not follow the machine.
_X264 = {"crf": "16", "preset": "medium", "threads": "2"}


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
        self.size = size
        height, width = size
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise InputError(f"size: expected an even height and width, got {height}x{width}")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.num_frames = 0
        self._sound: np.ndarray | None = None  # [1 or 2, S]
        self._rate = 0
        if audio is not None:
            self._sound, self._rate = _prepare_sound(*audio)
        self._sent = 0
        self._container: av.container.OutputContainer | None = None

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
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            expected = f"uint8 [n, {self.size[0]}, {self.size[1]}, 3]"
            raise InputError(f"frames: expected {expected}, got {frames.dtype} {list(frames.shape)}")
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1,
                interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            )  # fmt: skip
            frame.pts, frame.time_base = self.num_frames, 1 / self.fps
            self._mux(self._video.encode(frame))
            self.num_frames += 1
            self._write_sound()

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
        video = self._video = self._container.add_stream("libx264", rate=self.fps, options=dict(_X264))
        video.height, video.width = self.size
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.time_base = 1 / self.fps
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        if self._sound is not None:
            layout = "mono" if self._sound.shape[0] == 1 else "stereo"
            self._audio = self._container.add_stream("aac", rate=self._rate, layout=layout)
            self._audio.bit_rate = 96_000 * self._sound.shape[0]

    def _write_sound(self, *, last: bool = False) -> None:
        """Encode the sound up to the end of the video so far, in whole blocks except at the very end."""
        if self._sound is None:
            return
        due = min(math.ceil(self.num_frames * self._rate / self.fps), self._sound.shape[1])
        while self._sent + (1 if last else _AAC_BLOCK) <= due:
            block = np.ascontiguousarray(self._sound[:, self._sent : min(self._sent + _AAC_BLOCK, due)])
            layout = "mono" if block.shape[0] == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._sent, Fraction(1, self._rate)
            self._mux(self._audio.encode(frame))
            self._sent += block.shape[1]

    def _mux(self, packets: list[av.Packet]) -> None:
        assert self._container is not None, "write is for the inside of the with block"
        try:
            self._container.mux(packets)
        except av.error.FFmpegError as e:
            raise InputError(f"{self.path}: the output could not be written ({e.strerror})") from None

    def _finish(self) -> None:
        if not self.num_frames:
            raise InputError(f"{self.path}: expected at least one frame to write, got none")
        self._write_sound(last=True)
        self._mux(self._video.encode())
        if self._sound is not None:
            self._mux(self._audio.encode())
        assert self._container is not None
        self._container.close()
        self._container = None
        umask = os.umask(0)
        os.umask(umask)
        self._part.chmod(0o666 & ~umask)  # mkstemp's files are for the owner only
        self._part.replace(self.path)

    def _discard(self) -> None:
        """Close what is open and remove the temporary file, if it is still there."""
        if self._container is not None:
            with contextlib.suppress(av.error.FFmpegError):  # the file goes anyway; the first error is the one to show
                self._container.close()
            self._container = None
        self._part.unlink(missing_ok=True)


def _prepare_sound(samples: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """float32 [S] or [S, channels] -> ([1 or 2, S'], a rate that AAC knows). More than two channels become mono."""
    sound = np.asarray(samples, np.float32)
    sound = sound[:, None] if sound.ndim == 1 else sound
    if sound.ndim != 2 or not sound.shape[0] or not 1 <= sound.shape[1] <= 64:
        raise InputError(f"audio: expected [S] or [S, channels] with S > 0, got {list(np.shape(samples))}")
    if not np.isfinite(sound).all():
        raise InputError("audio: expected finite samples, got NaN or infinity")
    if sound.shape[1] > 2:
        sound = sound.mean(axis=1, keepdims=True)
    if rate not in _AAC_RATES:
        sound, rate = soxr.resample(sound, rate, 48_000, quality="VHQ").reshape(-1, sound.shape[1]), 48_000
    return np.ascontiguousarray(sound.T, np.float32), rate
