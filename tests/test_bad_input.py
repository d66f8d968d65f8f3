"""Files that are not what they should be: one clear sentence with the file's name, and nothing is left behind."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from media_files import clicks, face_video, numbered, quadrants, write_sound, write_video, write_wav

from avatar_rt.errors import InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.face import crop_face, track_face
from avatar_rt.media.reader import iter_frames, read_image, read_video, read_video_audio
from avatar_rt.media.writer import VideoWriter, check_output

Case = tuple[Callable[[Path], Path], str]


def reference(path: Path) -> None:
    """What the engine does first with a reference video."""
    clip = read_video(path)
    crop_face(clip.frames, track_face(clip.frames, name=str(path)), 64)


def holding(name: str, data: bytes) -> Callable[[Path], Path]:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def cut(path: Path, share: float) -> Path:
    """Keep only the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def overwritten(path: Path) -> Path:
    """Keep a file's head and tail and fill what is between with noise."""
    data = bytearray(path.read_bytes())
    lo, hi = len(data) // 10, 9 * len(data) // 10
    data[lo:hi] = np.random.default_rng(0).integers(0, 256, hi - lo, np.uint8).tobytes()
    path.write_bytes(data)
    return path


def noise(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def folder_named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def no_frames(folder: Path) -> Path:
    """A file with a video stream that holds nothing."""
    with av.open(str(folder / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return folder / "v.mkv"


def song_with_cover(folder: Path) -> Path:
    """A flac file with a picture block: a video stream to FFmpeg, a cover to everybody else."""
    path = write_sound(folder / "song.flac", clicks(1, 44_100), 44_100, "flac")
    image = cv2.imencode(".png", quadrants())[1].tobytes()
    block = struct.pack(">II", 3, 9) + b"image/png" + struct.pack(">I", 0) + struct.pack(">4I", 64, 48, 24, 0)
    block += struct.pack(">I", len(image)) + image
    data = path.read_bytes()
    after = 8 + int.from_bytes(data[5:8], "big")  # behind the first metadata block
    path.write_bytes(data[:after] + b"\x06" + len(block).to_bytes(3, "big") + block + data[after:])
    return path


def locked(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        (folder / name).write_bytes(b"x")
        (folder / name).chmod(0)
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "v.mp4")
    return folder / "v.mp4"


VIDEOS: dict[str, Case] = {
    "missing": (lambda d: d / "v.mp4", "no such file"),
    "directory": (folder_named("v.mp4"), "got a directory"),
    "no permission": (locked("v.mp4"), "no permission"),
    "named pipe": (pipe, "not a regular file"),
    "empty": (holding("v.mp4", b""), "empty file"),
    "text": (holding("v.mp4", b"Dear sir or madam,\n" * 200), "cannot be read as one"),
    "text by name too": (holding("v.txt", b"Dear sir or madam,\n" * 200), "cannot be read as one"),
    "play list": (holding("v.m3u8", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "cannot be read as one"),
    "noise": (holding("v.mp4", np.random.default_rng(0).bytes(20_000)), "cannot be read as one"),
    "header only": (lambda d: cut(write_video(d / "v.mp4", noise(50)), 0.01), "cannot be read as one"),
    "index cut off": (lambda d: cut(write_video(d / "v.mp4", noise(50)), 0.7), "cannot be read as one"),
    "pictures cut off": (
        lambda d: cut(write_video(d / "v.mp4", noise(75), options={"movflags": "faststart"}), 0.5),
        "breaks off",
    ),
    "mkv cut off": (lambda d: cut(write_video(d / "v.mkv", noise(75)), 0.5), "breaks off"),
    "pictures overwritten": (lambda d: overwritten(write_video(d / "v.mp4", noise(75))), "v.mp4"),
    "sound file": (lambda d: write_wav(d / "s.wav", clicks(1, 16_000), 16_000), "no video stream"),
    "sound in mp4": (lambda d: write_sound(d / "s.mp4", clicks(1, 16_000), 16_000, "aac"), "no video stream"),
    "song with a cover": (song_with_cover, "no video stream"),
    "png": (holding("v.png", cv2.imencode(".png", quadrants())[1].tobytes()), "got a picture"),
    "jpeg named mp4": (holding("v.mp4", cv2.imencode(".jpg", quadrants())[1].tobytes()), "got a picture"),
    "no frames": (no_frames, "cannot be read as one"),
    "1x1": (lambda d: write_video(d / "v.mkv", noise(20, 1, 1), codec="ffv1", pix_fmt="gray"), "no face"),
    "black": (lambda d: write_video(d / "v.mp4", np.zeros((25, 64, 64, 3), np.uint8)), "no face"),
    "no face": (lambda d: write_video(d / "v.mp4", numbered(25)), "no face"),
    "one frame": (lambda d: write_video(d / "v.mp4", face_video(1, lambda i: [(120, 90, 80)])), "at least 0.5 s"),
    "too short": (lambda d: write_video(d / "v.mp4", face_video(8, lambda i: [(120, 90, 80)])), "at least 0.5 s"),
    "a glimpse": (
        lambda d: write_video(d / "v.mp4", face_video(60, lambda i: [(120, 90, 80)] if i < 4 else [])),
        "most of",
    ),
    "a face far away": (lambda d: write_video(d / "v.mp4", face_video(15, lambda i: [(120, 90, 14)])), "v.mp4"),
}


def floats(values: np.ndarray) -> Callable[[Path], Path]:
    """A wav file of 32-bit floats, whatever they are."""
    data = values.astype("<f4").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32,
                       b"data", len(data))  # fmt: skip
    return holding("s.wav", head + data)


SOUNDS: dict[str, Case] = {
    "missing": (lambda d: d / "s.wav", "no such file"),
    "directory": (folder_named("s.wav"), "got a directory"),
    "no permission": (locked("s.wav"), "no permission"),
    "empty": (holding("s.wav", b""), "empty file"),
    "text": (holding("s.wav", b"la la la\n" * 500), "cannot be read as one"),
    "noise": (holding("s.mp3", b"\x00" + np.random.default_rng(1).bytes(20_000)), "s.mp3"),
    "header only": (lambda d: write_wav(d / "s.wav", np.zeros(0), 16_000), "s.wav"),
    "half a header": (lambda d: cut(write_wav(d / "s.wav", np.zeros(0), 16_000), 0.5), "s.wav"),
    "too short": (lambda d: write_wav(d / "s.wav", clicks(0.05, 16_000), 16_000), "at least 0.2 s of sound, got 0.05"),
    "NaN": (floats(np.r_[np.zeros(8_000), np.nan, np.zeros(8_000)]), "1 that are NaN or infinite"),
    "infinite": (floats(np.full(16_000, np.inf)), "NaN or infinite"),
    "m4a cut off": (lambda d: cut(write_sound(d / "s.m4a", clicks(3, 16_000), 16_000, "aac"), 0.6), "cannot be read"),
    "flac overwritten": (lambda d: overwritten(write_sound(d / "s.flac", clicks(3, 16_000), 16_000, "flac")), "s.flac"),
    "silent film": (lambda d: write_video(d / "v.mp4", numbered(25)), "no sound"),
    "picture": (holding("s.png", cv2.imencode(".png", quadrants())[1].tobytes()), "cannot be read as one"),
}

PNG = cv2.imencode(".png", noise(1)[0])[1].tobytes()
PICTURES: dict[str, Case] = {
    "missing": (lambda d: d / "p.png", "no such file"),
    "directory": (folder_named("p.png"), "got a directory"),
    "empty": (holding("p.png", b""), "empty file"),
    "text": (holding("p.jpg", b"not a picture"), "cannot be read as one"),
    "cut off": (holding("p.png", PNG[: len(PNG) // 2]), "cannot be read as one"),
    "overwritten": (holding("p.png", PNG[:200] + b"\x55" * 2000 + PNG[2200:]), "cannot be read as one"),
    "video": (lambda d: write_video(d / "p.mp4", numbered(25)), "cannot be read as one"),
}


def refuses(read: Callable[[Path], object], case: Case, folder: Path) -> None:
    make, says = case
    path = make(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(InputError) as caught:
        read(path)
    sentence = str(caught.value)
    print(sentence)
    assert says in sentence and path.name in sentence, sentence
    assert "\n" not in sentence and len(sentence) < 300 + len(str(path))
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", VIDEOS)
def test_reference_video(tmp_path, name):
    refuses(reference, VIDEOS[name], tmp_path)


@pytest.mark.parametrize("name", SOUNDS)
def test_speech(tmp_path, name):
    refuses(read_audio, SOUNDS[name], tmp_path)


@pytest.mark.parametrize("name", PICTURES)
def test_scene_picture(tmp_path, name):
    refuses(read_image, PICTURES[name], tmp_path)


def test_a_cut_off_wav_is_what_is_left_of_it(tmp_path):
    """Recorders that are switched off leave a wrong length in the header; the samples are good."""
    speech = read_audio(cut(write_wav(tmp_path / "s.wav", clicks(4, 16_000), 16_000), 0.5))
    assert abs(speech.seconds - 2) < 0.01


def test_a_stream_refuses_at_its_first_frame(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        next(iter_frames(tmp_path / "v.mp4"))
    with pytest.raises(InputError, match="no such file"):
        read_video_audio(tmp_path / "v.mp4", num_frames=3)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("o.avi", "expected an output ending in .mp4, .mov, .mkv, got the extension '.avi'"),
        ("o", "no extension"),
        ("o.mp4.txt", "got the extension '.txt'"),
        ("folder.mp4", "got a directory"),
        ("nowhere/o.mp4", "there is no folder"),
        ("file/o.mp4", "there is no folder"),
    ],
)
def test_output(tmp_path, name, says):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for attempt in (lambda: check_output(tmp_path / name), lambda: VideoWriter(tmp_path / name, (48, 64))):
        with pytest.raises(InputError) as caught:
            attempt()
        assert says in str(caught.value) and name in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_output_in_a_folder_that_takes_no_files(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root writes everywhere but to where nobody can
        folder = Path("/proc/self")
        if not folder.is_dir():
            pytest.skip("no folder here refuses root")
    with pytest.raises(InputError, match="cannot be written there"):
        check_output(folder / "o.mp4")


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        (np.zeros(0, np.float32), "S > 0"),
        (np.zeros((2, 2, 2), np.float32), "expected"),
        (np.full(100, np.nan, np.float32), "finite"),
    ],
)
def test_sound_that_cannot_be_written(tmp_path, audio, says):
    with pytest.raises(InputError, match=says):
        VideoWriter(tmp_path / "o.mp4", (48, 64), audio=(audio, 16_000))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(self, packets):
        raise av.error.OSError(28, "No space left on device")

    writer = VideoWriter(tmp_path / "o.mp4", (48, 64))
    with pytest.raises(InputError, match=r"o\.mp4: the output could not be written"), writer:
        writer.write(numbered(2))
        monkeypatch.setattr(writer, "_mux", full.__get__(writer))
    assert os.listdir(tmp_path) == []
