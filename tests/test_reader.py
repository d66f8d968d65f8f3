"""Any video to upright RGB frames at 25 fps, sound in place."""

from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from media_files import CLIPS, clicks, delay, numbered, quadrants, write_video

from avatar_rt.media.audio import read_audio
from avatar_rt.media.reader import iter_frames, read_image, read_video
from avatar_rt.media.writer import VideoWriter


def shown(frames: np.ndarray) -> list[int]:
    """Which of ``numbered``'s frames each frame shows."""
    return np.round(frames.mean(axis=(1, 2, 3)) / 3).astype(int).tolist()


def middles(picture: np.ndarray) -> np.ndarray:
    """The pixel in the middle of each quarter of ``quadrants``."""
    h, w = picture.shape[:2]
    return picture[h // 4 :: h // 2, w // 4 :: w // 2].astype(int)


@pytest.mark.parametrize("fps", [10, 24000 / 1001, 25, 30, 50, 59.94])
def test_every_rate_keeps_its_timing(tmp_path, fps):
    count = round(fps)  # one second
    clip = read_video(write_video(tmp_path / "v.mp4", numbered(count), fps=fps))
    assert abs(len(clip.frames) - 25) <= 1
    nearest = [int(np.argmin(np.abs(np.arange(count) / fps - i / 25 + 1e-9))) for i in range(len(clip.frames))]
    assert np.abs(np.subtract(shown(clip.frames), nearest)).max() <= (0 if fps == 25 else 1)
    assert clip.audio is None and clip.fps == 25


def test_variable_rate(tmp_path):
    times = [0.0, 0.1, 0.12, 0.5, 0.54, 0.9]
    clip = read_video(write_video(tmp_path / "v.mkv", numbered(6), times=times))
    expected = [int(np.argmin(np.abs(np.array(times) - i / 25 + 1e-9))) for i in range(23)]
    assert shown(clip.frames)[:23] == expected


def test_a_late_start_is_time_zero(tmp_path):
    clip = read_video(write_video(tmp_path / "v.mkv", numbered(10), times=[3 + i / 25 for i in range(10)]))
    assert shown(clip.frames) == list(range(10))


def test_max_seconds_and_streaming(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(50))
    assert len(read_video(path, max_seconds=0.4).frames) == 10
    stream = iter_frames(path)
    assert next(stream).shape == (48, 64, 3)
    stream.close()


def test_an_image_sequence_of_one_frame_is_a_video(tmp_path):
    assert read_video(write_video(tmp_path / "v.mp4", numbered(1))).frames.shape == (1, 48, 64, 3)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_display_matrix(tmp_path, degrees, mirrored):
    picture = quadrants()
    path = write_video(tmp_path / "v.mp4", np.repeat(picture[None], 3, 0), turn={"degrees": degrees, "hflip": mirrored})
    expected = np.rot90(picture, degrees // 90)  # counter-clockwise, as the tag counts
    expected = expected[:, ::-1] if mirrored else expected
    got = read_video(path).frames[0]
    assert got.shape == expected.shape
    assert np.abs(middles(got) - middles(expected)).max() < 8


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "size"),
    [
        ("libx264", "yuv420p10le", (48, 64)),
        ("libx264", "yuv444p", (49, 65)),
        ("libx265", "yuv420p", (64, 64)),
        ("ffv1", "gray", (33, 47)),
        ("ffv1", "yuva420p", (48, 64)),
        ("ffv1", "rgb48le", (31, 45)),
        ("libvpx-vp9", "yuv422p", (48, 64)),
        ("mjpeg", "yuvj420p", (48, 64)),
    ],
)
def test_pixel_formats_depths_and_odd_sizes(tmp_path, codec, pix_fmt, size):
    ramp = np.linspace(10, 245, size[1]).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (*size, 3))
    frames = np.repeat(picture[None], 4, 0)
    got = read_video(write_video(tmp_path / "v.mkv", frames, codec=codec, pix_fmt=pix_fmt)).frames
    assert got.shape == frames.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - frames).mean() < 4


def test_pixels_are_made_square_and_large_frames_smaller(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(3), aspect=Fraction(3, 2))
    assert read_video(path).frames.shape == (3, 48, 96, 3)
    assert read_video(path, max_side=48).frames.shape == (3, 24, 48, 3)


def test_colours_come_back(tmp_path):
    picture = quadrants(64, 64)
    with VideoWriter(tmp_path / "v.mp4", (64, 64)) as writer:
        writer.write(np.repeat(picture[None], 3, 0))
    got = read_video(tmp_path / "v.mp4").frames[1]
    assert np.abs(middles(got) - middles(picture)).max() <= 4


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_sound_of_a_video(tmp_path, rate):
    sound = clicks(2.0, rate, 2)
    with VideoWriter(tmp_path / "v.mp4", (48, 64), audio=(sound, rate)) as writer:
        writer.write(numbered(50))
    clip = read_video(tmp_path / "v.mp4")
    assert clip.audio.shape == (32_000,) and clip.audio.dtype == np.float32
    assert abs(delay(clicks(2.0, 16_000)[:, 0], clip.audio)) <= 2
    assert read_video(tmp_path / "v.mp4", max_seconds=1).audio.shape == (16_000,)


def test_short_or_late_sound_is_filled_up(tmp_path):
    """Sound that starts 0.5 s after the picture and ends before it."""
    path = tmp_path / "v.mkv"
    tone = clicks(1.0, 16_000)[:, 0]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for rgb in numbered(50):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 8_000, Fraction(1, 16_000)
        container.mux(audio.encode(frame))
        container.mux(video.encode())
        container.mux(audio.encode())
    got = read_video(path).audio
    assert got.shape == (32_000,)
    assert not got[:7_900].any() and not got[24_100:].any()
    assert abs(delay(np.pad(tone, (8_000, 8_000)), got)) <= 1


@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
@pytest.mark.parametrize(("pictures", "seconds"), [(100, 0.5), (15, 4.0)])
def test_unequal_lengths_of_picture_and_sound_are_no_damage(tmp_path, extension, pictures, seconds):
    path = tmp_path / f"v{extension}"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for rgb in numbered(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        tone = clicks(seconds, 16_000)[:, 0]
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            container.mux(audio.encode(frame))
        container.mux(video.encode())
        container.mux(audio.encode())
    clip = read_video(path)
    assert len(clip.frames) == pictures and len(clip.audio) == pictures * 640
    assert abs(read_audio(path).seconds - seconds) < 0.08


def test_read_image(tmp_path):
    picture = quadrants()
    cv2.imwrite(str(tmp_path / "p.png"), picture[..., ::-1])
    assert np.array_equal(read_image(tmp_path / "p.png"), picture)
    cv2.imwrite(str(tmp_path / "grey.png"), picture[..., 0])
    assert read_image(tmp_path / "grey.png").shape == (48, 64, 3)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_read_image_turns_by_exif(tmp_path, orientation):
    picture = quadrants()
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    tag = b"\x01\x12\x00\x03\x00\x00\x00\x01" + orientation.to_bytes(2, "big") + b"\x00\x00"
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x01" + tag + b"\x00\x00\x00\x00"
    marked = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    (tmp_path / "p.jpg").write_bytes(marked)
    expected = np.rot90(picture, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    got = read_image(tmp_path / "p.jpg")
    assert got.shape == expected.shape
    assert np.abs(middles(got) - middles(expected)).max() < 8


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the development clips are not on this machine")
def test_real_clips():
    paths = sorted(CLIPS.iterdir())
    assert paths
    for path in paths:
        clip = read_video(path, max_seconds=0.4, max_side=320)
        assert clip.frames.shape[0] == 10 and max(clip.frames.shape[1:3]) <= 320
        assert clip.audio is None or clip.audio.shape == (6_400,)
