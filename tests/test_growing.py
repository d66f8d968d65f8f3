"""A video that grows: playable at every moment, in sync, and the same bytes after any break."""

from __future__ import annotations

import itertools
import os

import av
import numpy as np
import pytest
from media_files import clicks, delay, numbered

from avatar_rt.errors import InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.fragments import FragmentWriter
from avatar_rt.media.growing import GrowingVideo, Mark, OutputStopped, to_plain_file
from avatar_rt.media.reader import read_video
from avatar_rt.media.writer import VideoWriter

PARTS = (0, 1, 14, 38, 60, 75)  # the first fragment is shorter than a block of sound


def _numbers(path) -> list[int]:
    return np.round(read_video(path).frames.mean(axis=(1, 2, 3)) / 3).astype(int).tolist()


def _grow(path, sound, rate, *, stop=None, at=None, on_write=lambda: None) -> Mark:
    with GrowingVideo(path, (48, 64), sound=(sound.shape[1], rate), at=at) as video:
        for i, start in enumerate(range(0, len(sound), rate)):
            video.add_sound(sound[start : start + rate], last=start + rate >= len(sound))
            for low, high in itertools.pairwise(PARTS):
                due = low >= video.mark.frames and high <= 25 * (i + 1)
                if due:
                    video.write(numbered(75)[low:high])
                    on_write()
                    if stop == high:
                        return video.mark
        video.finish()
        return video.mark


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (22_222, 1), (48_000, 6)])
def test_what_goes_in_comes_out_in_sync(tmp_path, rate, channels):
    sound, path = clicks(3.0, rate, channels), tmp_path / "g.mp4"
    _grow(path, sound, rate)
    for extension in (".mp4", ".mov", ".mkv"):
        to_plain_file(path, tmp_path / f"plain{extension}")
    for made in (path, *(tmp_path / f"plain{e}" for e in (".mp4", ".mov", ".mkv"))):
        assert _numbers(made) == list(range(75))
        slack = 16 if made.suffix == ".mkv" else 2  # Matroska's times are whole milliseconds
        assert abs(delay(clicks(3.0, 16_000)[:, 0], read_video(made).audio)) <= slack, made.suffix
    assert abs(read_audio(path).seconds - 3.0) < 0.07
    assert sorted(os.listdir(tmp_path)) == ["g.mp4", "plain.mkv", "plain.mov", "plain.mp4"]
    data = (tmp_path / "plain.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat") and b"moof" not in data


def test_playable_at_every_moment(tmp_path):
    seen = []
    path = tmp_path / "g.mp4"
    _grow(path, clicks(3.0, 16_000), 16_000, on_write=lambda: seen.append(_numbers(path)))
    assert [len(s) for s in seen] == list(PARTS[1:]) and all(s == list(range(len(s))) for s in seen)


@pytest.mark.parametrize("stop", PARTS[1:])
@pytest.mark.parametrize("rate", [16_000, 22_222])
def test_broken_off_and_gone_on_with_has_the_same_bytes(tmp_path, stop, rate):
    sound = clicks(3.0, rate, 2)
    whole, broken = tmp_path / "w.mp4", tmp_path / "b.mp4"
    _grow(whole, sound, rate)
    mark = _grow(broken, sound, rate, stop=stop)
    with broken.open("ab") as f:
        f.write(b"half a fragment")
    _grow(broken, sound, rate, at=mark)
    assert whole.read_bytes() == broken.read_bytes()


def test_every_fragment_stands_alone(tmp_path):
    """Key frames where fragments begin, and no picture that needs one after it."""
    _grow(tmp_path / "g.mp4", clicks(3.0, 16_000), 16_000)
    with av.open(str(tmp_path / "g.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    assert set(PARTS[:-1]) <= set(keys) and len(packets) == 75
    assert all(p.pts == p.dts for p in packets)


def test_without_sound(tmp_path):
    with GrowingVideo(tmp_path / "g.mp4", (48, 64)) as video:
        video.write(numbered(10))
        video.write(numbered(20)[10:])
        video.finish()
    assert _numbers(tmp_path / "g.mp4") == list(range(20))


def test_what_cannot_be(tmp_path):
    with pytest.raises(InputError, match="even height and width"):
        GrowingVideo(tmp_path / "g.mp4", (47, 64))
    with pytest.raises(InputError, match="cannot be written there"):
        GrowingVideo(tmp_path / "nowhere" / "g.mp4", (48, 64))
    (tmp_path / "g.mp4").write_bytes(b"short")
    with pytest.raises(InputError, match="at least 99 bytes"):
        GrowingVideo(tmp_path / "g.mp4", (48, 64), at=Mark(size=99))
    with pytest.raises(InputError, match="expected uint8"), GrowingVideo(tmp_path / "g.mp4", (48, 64)) as video:
        video.write(np.zeros((2, 48, 60, 3), np.uint8))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this machine has no /dev/full")
def test_a_full_disk_says_so(tmp_path):
    with GrowingVideo(tmp_path / "g.mp4", (48, 64)) as video:
        video._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(OutputStopped, match="could not be written any further"):
            video.write(numbered(2))
        assert video.mark == Mark()


def test_what_makes_x264_give_other_bytes_is_off(tmp_path):
    """Its macroblock tree reads memory that nobody wrote: one fragment in some hundred differs, too few to test."""
    sound, frames = clicks(1.0, 16_000), numbered(25)
    _grow(tmp_path / "grown.mp4", clicks(3.0, 16_000), 16_000)
    with VideoWriter(tmp_path / "whole.mp4", (48, 64), audio=(sound, 16_000)) as video:
        video.write(frames)
    live = FragmentWriter((48, 64), 16_000).write(frames, sound[:, 0])
    for data in (live, *(p.read_bytes() for p in tmp_path.iterdir())):
        options = data[data.index(b"options: ") :].split(b"\0")[0].split()
        assert b"mbtree=0" in options and b"threads=1" in options
