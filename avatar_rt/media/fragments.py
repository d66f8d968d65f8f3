"""Frames and sound to fragments of an mp4 in memory, one per chunk, for a player that is already playing."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType

from avatar_rt.config import FPS
from avatar_rt.errors import InputError
from avatar_rt.media.growing import boxes
from avatar_rt.media.writer import add_video, check_frames, check_size, to_picture

# No frame waits for a later one.
_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
# A muxer per chunk, whose fragment begins at the chunk's own time: nothing of a chunk is held back for the next one.
_MUXER = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "fflags": "+bitexact",
    "avoid_negative_ts": "disabled",
    "use_editlist": "0",
}


class FragmentWriter:
    """h264 and aac in a fragmented mp4: ``init`` once, then what ``write`` gives, in order, appended to one another.

    Every fragment begins with a key frame. The sound encoder holds back up to 128 ms (at 16 kHz) for the next fragment.

    Args:
        size: (height, width), both even.
        rate: Samples per second of the sound.
        fps: Frames per second.

    Attributes:
        mime: What a browser's ``MediaSource`` wants to know.
        init: The initialisation segment.
    """

    def __init__(self, size: tuple[int, int], rate: int, fps: int = FPS) -> None:
        self.size, self.rate, self.fps = check_size(size), rate, Fraction(fps)
        self._frames = self._samples = 0
        # Only holds the encoders; what it writes of a header is thrown away.
        self._encoders = av.open(io.BytesIO(), "w", format="mp4", options={"movflags": "empty_moov"})
        self._video = add_video(self._encoders, size, self.fps, _OPTIONS)
        self._audio = self._encoders.add_stream("aac", rate=rate, layout="mono")
        self._audio.bit_rate = 96_000
        self._encoders.start_encoding()
        self.init = b"".join(boxes(self._mux([], []), b"ftyp", b"moov"))
        at = self.init.index(b"avcC") + 5  # profile, constraints, level, as the decoder will read them
        profile = self.init[at : at + 3].hex().upper()
        self.mime = f'video/mp4; codecs="avc1.{profile}, mp4a.40.2"'

    def write(self, frames: np.ndarray, sound: np.ndarray) -> bytes:
        """The fragment of a chunk: uint8 [n, H, W, 3] RGB with n > 0, and their sound fp32 [n * rate / fps]."""
        check_frames(frames, self.size)
        if not len(frames):
            raise InputError("frames: expected uint8 frames, at least one, got none")
        count = len(frames) * self.rate // self.fps
        if sound.shape != (count,):
            raise InputError(f"sound: expected [{count}], got {list(sound.shape)}")
        packets = []
        for i, rgb in enumerate(frames):
            frame = to_picture(rgb, self._frames, self.fps)
            if i == 0:
                frame.pict_type = PictureType.I
            packets += self._video.encode(frame)
            self._frames += 1
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound, np.float32)[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = self.rate, self._samples, Fraction(1, self.rate)
        self._samples += count
        return self._fragment(packets, self._audio.encode(block))

    def finish(self) -> bytes:
        """The rest of the sound; may be empty. Nothing can be written afterwards."""
        video, audio = self._video.encode(), self._audio.encode()
        self._encoders.close()
        return self._fragment(video, audio) if video or audio else b""

    def _fragment(self, video: list[av.Packet], audio: list[av.Packet]) -> bytes:
        return b"".join(boxes(self._mux(video, audio), b"moof", b"mdat"))

    def _mux(self, video: list[av.Packet], audio: list[av.Packet]) -> bytes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options=_MUXER) as container:
            streams = [container.add_stream_from_template(s) for s in (self._video, self._audio)]
            container.start_encoding()
            for stream, packets in zip(streams, (video, audio)):
                for packet in packets:
                    # The sound encoder's first packet is from before the start; a player needs no running start.
                    if packet.pts is not None and packet.pts >= 0:
                        packet.stream = stream
                        container.mux(packet)
        return buffer.getvalue()
