"""A video file that grows by one closed fragment per chunk: playable meanwhile, and gone on with after any crash."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np

from avatar_rt.config import FPS
from avatar_rt.errors import InputError
from avatar_rt.media.writer import SoundTrack, add_video, check_frames, check_size, publish, to_picture

# No B-frames: every picture is shown when it is decoded, so that a fragment's times need nothing of its neighbours.
_OPTIONS = {"crf": "14", "preset": "veryfast", "bf": "0"}
_FRAGMENT = {
    "movflags": "empty_moov+frag_custom+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # a fragment begins at its own time, not at zero
    "use_editlist": "0",
}
_HEADER = {"movflags": "delay_moov+frag_custom+default_base_moof+skip_trailer"}
_PRIMING = 1024  # samples by which the aac encoder is late; the header's edit list takes them off again


class OutputStopped(InputError):
    """Nothing more could be written, for instance because the disk is full. What was written before stays whole."""


@dataclass(frozen=True)
class Mark:
    """How far a growing file has come.

    Attributes:
        size: Bytes of it that are whole.
        frames, fragments, packets: Pictures, fragments, and packets of sound in them.
    """

    size: int = 0
    frames: int = 0
    fragments: int = 0
    packets: int = 0


class GrowingVideo:
    """Appends h264 and aac to a fragmented mp4. When ``write`` returns, the fragment is on the disk.

    Every fragment has encoders of its own for the pictures, so it depends on its frames alone. The sound is one stream
    from the first sample to the last: to go on with a file, all of it is encoded again and what is there is left out.
    So a file that was broken off and gone on with has the bytes of one that was not.

    Args:
        path: The growing file; it is created, or cut back to ``at``.
        size: (height, width), both even.
        sound: (channels, rate) of what ``add_sound`` will bring, or None.
        at: Where to go on.

    Raises: InputError on a size above, or a file that cannot be written or is shorter than ``at`` says.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        fps: float | Fraction = FPS,
        *,
        sound: tuple[int, int] | None = None,
        at: Mark | None = None,
    ) -> None:
        self.path, self.size, self.mark = path, check_size(size), at or Mark()
        self.fps = Fraction(fps).limit_denominator(1001)
        try:
            self._file = open(path, "r+b" if at else "wb")  # noqa: SIM115
            if at and os.fstat(self._file.fileno()).st_size < at.size:
                raise InputError(f"{path}: expected at least {at.size} bytes to go on with, got fewer")
            self._file.truncate(self.mark.size)
            self._file.seek(self.mark.size)
        except OSError as e:
            raise InputError(f"{path}: the output cannot be written there ({e.strerror})") from None
        self._sound: SoundTrack | None = None
        self._packets: deque[av.Packet] = deque()
        self._made = 0
        if sound is not None:
            # Holds the encoder; what the muxer writes is thrown away.
            self._holder = av.open(io.BytesIO(), "w", format="mp4", options=dict(_FRAGMENT))
            self._sound = SoundTrack(self._holder, *sound)
            self._holder.start_encoding()

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._sound is not None:
            with contextlib.suppress(av.error.FFmpegError):
                self._holder.close()

    def add_sound(self, samples: np.ndarray, *, last: bool = False) -> None:
        """Appends sound float32 [S, channels]; ``write`` takes what belongs to its frames. From the first sample on."""
        assert self._sound is not None, "this file has no sound"
        self._sound.add(samples, last=last)
        self._encode_sound(self.mark.frames)

    def write(self, frames: np.ndarray) -> None:
        """Appends one fragment: uint8 [n > 0, H, W, 3] RGB and the sound of their time.

        Raises: InputError on other frames; OutputStopped when the file cannot take it.
        """
        check_frames(frames, self.size)
        shown = self.mark.frames + len(frames)
        self._encode_sound(shown)
        with av.open(io.BytesIO(), "w", format="mp4", options=dict(_FRAGMENT)) as container:
            video = add_video(container, self.size, self.fps, _OPTIONS)
            container.start_encoding()  # opens the encoder, whose parameters the muxers copy
            pictures = []
            for i, rgb in enumerate(frames):
                pictures += video.encode(to_picture(rgb, self.mark.frames + i, self.fps))
            pictures += video.encode()
            self._append(video, pictures, shown)

    def finish(self) -> None:
        """Appends the rest of the sound, up to the last frame's end."""
        if self._sound is None:
            return
        self._encode_sound(self.mark.frames, last=True)
        if self._packets:
            with av.open(io.BytesIO(), "w", format="mp4", options=dict(_FRAGMENT)) as container:
                video = add_video(container, self.size, self.fps, _OPTIONS)
                container.start_encoding()
                self._append(video, [], self.mark.frames)

    def _encode_sound(self, frames: int, *, last: bool = False) -> None:
        if self._sound is not None:
            for packet in self._sound.encode(frames / self.fps, last=last):
                self._made += 1
                if self._made > self.mark.packets:
                    self._packets.append(packet)

    def _append(self, video: av.VideoStream, pictures: list[av.Packet], frames: int) -> None:
        sound = list(self._packets)
        self._packets.clear()
        data = (
            b""
            if self.mark.fragments
            else b"".join(boxes(self._mux(_HEADER, video, pictures[:1], None), b"ftyp", b"moov"))
        )
        number = {"fragment_index": str(self.mark.fragments + 1)}
        data += b"".join(boxes(self._mux(_FRAGMENT | number, video, pictures, sound), b"moof", b"mdat"))
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise OutputStopped(f"{self.path}: the output could not be written any further ({e.strerror})") from None
        m = self.mark
        self.mark = Mark(m.size + len(data), frames, m.fragments + 1, m.packets + len(sound))

    def _mux(
        self, options: dict[str, str], video: av.VideoStream, pictures: list[av.Packet], sound: list[av.Packet] | None
    ) -> bytes:
        """An mp4 of these packets. ``sound`` None: of the header's making, with a packet that only tells the delay."""
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options=dict(options), container_options={"fflags": "+bitexact"}) as c:
            to = c.add_stream_from_template(video)
            track = None if self._sound is None else c.add_stream_from_template(self._sound.stream)
            c.start_encoding()
            for packet in pictures:
                c.mux(_copy(packet, to, 0))
            if self._sound is not None and track is not None:
                if sound is None:
                    c.mux(_copy(_first_packet(self._sound.rate), track, 0))
                for packet in sound or ():
                    # A fragment's times count from the encoder's first sample, before the edit list.
                    c.mux(_copy(packet, track, _PRIMING))
        return buffer.getvalue()


def _first_packet(rate: int) -> av.Packet:
    packet = av.Packet(b"\0")
    packet.pts = packet.dts = -_PRIMING
    packet.duration, packet.time_base = _PRIMING, Fraction(1, rate)
    return packet


def _copy(packet: av.Packet, stream: av.stream.Stream, shift: int) -> av.Packet:
    assert packet.pts is not None and packet.dts is not None
    out = av.Packet(bytes(packet))
    out.pts, out.dts, out.duration = packet.pts + shift, packet.dts + shift, packet.duration
    out.time_base, out.is_keyframe, out.stream = packet.time_base, packet.is_keyframe or shift > 0, stream
    return out


def boxes(data: bytes, *names: bytes) -> Iterator[bytes]:
    """The boxes of these names at the top level of an mp4."""
    at = 0
    while at + 8 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4 : at + 8] in names:
            yield data[at : at + length]
        at += length


def to_plain_file(part: Path, path: Path) -> None:
    """Makes an ordinary file of a grown one: the same packets, and for an mp4 one index at its start.

    The index is made in memory, about 20 MB per hour of video. Raises: OutputStopped when it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    whole = Path(name)
    options = {"movflags": "faststart"} if path.suffix.lower() in (".mp4", ".mov") else {}
    try:
        with (
            av.open(f"file:{part}") as source,
            av.open(f"file:{whole}", "w", options=options, container_options={"fflags": "+bitexact"}) as target,
        ):
            streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    target.mux(packet)
        publish(whole, path)
    except (OSError, av.error.FFmpegError) as e:
        raise OutputStopped(f"{path}: the output could not be written ({e.strerror})") from None
    finally:
        whole.unlink(missing_ok=True)
