"""Opening users' files: the checks and the error sentences that every reader shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Stream

from avatar_rt.errors import InputError

# Demuxers that read one self-contained file. Play lists (hls, dash, concat) are left out on purpose: a file that a
# stranger sends must not make us open other files or addresses.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,h264,hevc,ivf,nut,mxf,gif,"
    "wav,w64,aiff,au,caf,flac,mp3,aac,ogg,ac3,eac3,amr,voc,wv,ape,tta"
)
_MAX_DAMAGED = 0.1  # share of undecodable packets above which a file counts as damaged


def check_file(path: str | os.PathLike[str], expected: str) -> Path:
    """The path of a readable, non-empty file. ``expected`` names its kind ("a video"). Raises InputError."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file}: expected {expected}, but there is no such file")
    if file.is_dir():
        raise InputError(f"{file}: expected {expected}, got a directory")
    if not file.is_file():
        raise InputError(f"{file}: expected {expected}, got something that is not a regular file")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}: expected {expected}, but there is no permission to read this file")
    if file.stat().st_size == 0:
        raise InputError(f"{file}: expected {expected}, got an empty file (0 bytes)")
    return file


@contextmanager
def open_media(path: str | os.PathLike[str], expected: str) -> Iterator[InputContainer]:
    """Open a video or sound file for reading; whatever goes wrong inside becomes an InputError with the file's name."""
    file = check_file(path, expected)
    try:
        # "file:" keeps a name such as "a:b.mp4" from being taken for a protocol.
        with av.open(f"file:{file}", container_options={"format_whitelist": _FORMATS}) as container:
            yield container
    except av.error.FFmpegError as e:
        unknown = isinstance(e, (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError))
        reason = "an unknown format, or damaged" if unknown else e.strerror
        raise InputError(f"{file}: expected {expected}, got a file that cannot be read as one ({reason})") from None


def decode(container: InputContainer, stream: Stream, path: str | os.PathLike[str]) -> Iterator:
    """Decoded frames of one stream. A few damaged packets are skipped; a file with many of them is refused.

    Raises: InputError when more than a tenth of the packets cannot be decoded.
    """
    packets = damaged = 0
    for packet in container.demux(stream):
        packets += 1
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            continue
        yield from frames
    if damaged > _MAX_DAMAGED * packets:
        raise InputError(f"{path}: the file is damaged: {damaged} of its {packets} {stream.type} packets do not decode")


def check_complete(container: InputContainer, stream: Stream, end: float, path: str | os.PathLike[str]) -> None:
    """Refuse a file that breaks off: ``end`` is the time in seconds that decoding reached, the header says the rest."""
    length = _stated_seconds(container, stream)
    if length is not None and end < 0.9 * length - 0.5:
        raise InputError(
            f"{path}: the file breaks off: it holds {end:.1f} s of the {length:.1f} s that its header states"
        )


def _stated_seconds(container: InputContainer, stream: Stream) -> float | None:
    """A stream's length by the file's own header; None where there is none or FFmpeg only estimates it."""
    if not any(name in container.format.name for name in ("mov", "matroska", "avi")):
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    match stream.metadata.get("DURATION", "").split(":"):  # Matroska's tag, hours:minutes:seconds
        case [hours, minutes, seconds]:
            return 3600 * float(hours) + 60 * float(minutes) + float(seconds)
    return None
