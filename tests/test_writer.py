"""h264 + aac out: in sync, all or nothing, and the same bytes every time."""

from __future__ import annotations

import os

import av
import cv2
import numpy as np
import pytest
from media_files import clicks, delay, numbered, quadrants

from avatar_rt.errors import InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.reader import read_video
from avatar_rt.media.sheet import contact_sheet
from avatar_rt.media.writer import EXTENSIONS, VideoWriter, check_output


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_goes_in_comes_out_in_sync(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    sound = clicks(2.6, 44_100, 2)
    with VideoWriter(path, (48, 64), audio=(sound, 44_100)) as writer:
        writer.write(numbered(50)[:20])
        writer.write(numbered(50)[20])  # a single frame
        writer.write(numbered(50)[21:])
        assert not path.exists()
    assert os.listdir(tmp_path) == [path.name]
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == "h264" and video.codec_context.pix_fmt == "yuv420p"
        assert video.average_rate == 25 and audio.codec_context.name == "aac"
        assert audio.codec_context.sample_rate == 44_100 and audio.codec_context.channels == 2
    clip = read_video(path)
    assert np.round(clip.frames.mean(axis=(1, 2, 3)) / 3).astype(int).tolist() == list(range(50))
    speech = read_audio(path)
    assert abs(speech.seconds - 2.0) < 0.05  # what goes on after the last frame is cut, up to one aac block
    assert abs(delay(sound[:, 0], speech.original[:, 0])) <= 2


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_same_input_same_bytes(tmp_path, extension):
    for name in ("a", "b"):
        with VideoWriter(tmp_path / f"{name}{extension}", (48, 64), audio=(clicks(1, 16_000), 16_000)) as writer:
            writer.write(np.roll(np.repeat(quadrants()[None], 25, 0), 3, axis=2))
    assert (tmp_path / f"a{extension}").read_bytes() == (tmp_path / f"b{extension}").read_bytes()


def test_sound_and_picture_are_interleaved(tmp_path):
    with VideoWriter(tmp_path / "o.mp4", (48, 64), audio=(clicks(4, 16_000), 16_000)) as writer:
        writer.write(numbered(100))
    with av.open(str(tmp_path / "o.mp4")) as container:
        kinds = [p.stream.type for p in sorted((p for p in container.demux() if p.size), key=lambda p: p.pos)]
    first, last = kinds.index("audio"), len(kinds) - 1 - kinds[::-1].index("audio")
    assert first < len(kinds) / 4 and last > 3 * len(kinds) / 4


@pytest.mark.parametrize(("rate", "channels"), [(22_222, 1), (96_000, 2), (48_000, 6)])
def test_unusual_sound(tmp_path, rate, channels):
    sound = clicks(1.0, rate, channels)
    with VideoWriter(tmp_path / "o.mp4", (48, 64), audio=(sound, rate)) as writer:
        writer.write(numbered(25))
    assert abs(delay(clicks(1.0, 16_000)[:, 0], read_audio(tmp_path / "o.mp4").samples)) <= 2


def test_sound_shorter_than_the_video(tmp_path):
    with VideoWriter(tmp_path / "o.mp4", (48, 64), audio=(clicks(0.3, 16_000), 16_000)) as writer:
        writer.write(numbered(25))
    clip = read_video(tmp_path / "o.mp4")
    assert len(clip.frames) == 25 and len(clip.audio) == 16_000


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_keeps_the_old_file(tmp_path, error):
    (tmp_path / "o.mp4").write_bytes(b"yesterday's")
    with pytest.raises(error), VideoWriter(tmp_path / "o.mp4", (48, 64)) as writer:
        writer.write(numbered(10))
        raise error
    assert os.listdir(tmp_path) == ["o.mp4"]
    assert (tmp_path / "o.mp4").read_bytes() == b"yesterday's"


def test_no_frames_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="at least one frame"), VideoWriter(tmp_path / "o.mp4", (48, 64)):
        pass
    assert os.listdir(tmp_path) == []


def test_wrong_frames(tmp_path):
    for frames in (np.zeros((2, 48, 60, 3), np.uint8), np.zeros((2, 48, 64, 3), np.float32)):
        with pytest.raises(InputError, match="expected uint8"), VideoWriter(tmp_path / "o.mp4", (48, 64)) as writer:
            writer.write(frames)
    with pytest.raises(InputError, match="even height and width, got 47x64"):
        VideoWriter(tmp_path / "o.mp4", (47, 64))
    assert os.listdir(tmp_path) == []


def test_check_output(tmp_path):
    assert check_output(tmp_path / "o.MP4") == tmp_path / "o.MP4"
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_any_new_file(tmp_path):
    with VideoWriter(tmp_path / "o.mp4", (48, 64)) as writer:
        writer.write(numbered(2))
    (tmp_path / "plain").touch()
    assert (tmp_path / "o.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_contact_sheet(tmp_path):
    path = contact_sheet(numbered(50), 5, tmp_path / "s.png", rows=2)
    sheet = cv2.imread(str(path))
    assert sheet.shape == (2 * 52 - 4, 5 * 68 - 4, 3)
    assert sheet[0, 0, 0] == 0 and sheet[-1, -1, 0] == 49 * 3
    assert cv2.imread(str(contact_sheet(numbered(2), 6, tmp_path / "t.png"))).shape == (48, 132, 3)
    with pytest.raises(InputError, match=r"\.png"):
        contact_sheet(numbered(2), 6, tmp_path / "t.jpg")
