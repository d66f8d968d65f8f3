"""The face is found, followed and framed; a video without one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from media_files import CLIPS, clicks, draw_face, face_video

from avatar_rt.errors import InputError
from avatar_rt.media.face import CROP_SIDE, MIN_FRAMES, crop_face, detect_faces, read_face, track_face
from avatar_rt.media.reader import read_video
from avatar_rt.media.writer import VideoWriter


def middle(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


@pytest.mark.parametrize(("side", "height"), [(64, 36), (128, 72), (256, 140), (480, 60)])
def test_detection_and_its_box(side, height):
    picture = face_video(1, lambda i: [(side / 2, side / 2, height)], side, side)[0]
    found = detect_faces(picture)
    assert found.shape == (1, 5) and found[0, 4] > 0.85
    assert np.abs(found[0, :2] - side / 2).max() < 0.1 * height
    assert 0.85 < found[0, 3] / height < 1.1  # hairline to chin


def test_a_still_face_gives_a_still_box():
    track = track_face(face_video(30, lambda i: [(120, 90, 80)]))
    assert track.present.all() and track.score.min() > 0.85
    assert track.boxes.shape == (30, 4) and track.boxes.dtype == np.float32
    assert np.ptp(track.boxes, axis=0).max() < 0.01


def test_a_moving_face_is_followed_smoothly():
    where = lambda i: (70 + 1.5 * i, 90 + 6 * np.sin(i / 8))  # noqa: E731
    track = track_face(face_video(60, lambda i: [(*where(i), 70)]))
    centres = middle(track.boxes)
    assert np.abs(centres[:, 0] - [where(i)[0] for i in range(60)]).max() < 5
    assert np.abs(np.diff(centres, 2, axis=0)).max() < 0.15  # pixels per frame, per frame
    assert np.abs(np.diff(track.boxes[:, 3] - track.boxes[:, 1])).max() < 0.2


def test_several_faces_the_largest_central_one_is_kept():
    faces = lambda i: [(60 + i, 70, 42), (150, 100, 70), (215, 60, 40)]  # noqa: E731
    track = track_face(face_video(40, faces))
    assert track.present.all()
    assert np.abs(middle(track.boxes) - (150, 100)).max() < 6


def test_two_faces_that_pass_are_not_swapped():
    """The larger one walks right while a smaller one walks left above it."""
    track = track_face(face_video(60, lambda i: [(70 + 1.6 * i, 115, 74), (200 - 2.2 * i, 40, 40)]))
    assert np.abs(middle(track.boxes)[:, 0] - (70 + 1.6 * np.arange(60))).max() < 8


def test_two_faces_of_almost_one_size_are_followed_apart():
    """Which of them is the larger changes, and with it the order in which they are given to their paths."""
    track = track_face(face_video(30, lambda i: [(65, 90, 70), (175, 90, 66 if i % 2 else 76)]))
    assert np.ptp(middle(track.boxes)[:, 0]) < 4


def test_a_face_that_leaves_is_held_and_found_again():
    faces = lambda i: [] if 25 <= i < 60 else [(80 if i < 25 else 150, 90, 70)]  # noqa: E731
    track = track_face(face_video(90, faces))
    assert track.present[:22].all() and not track.present[30:56].any() and track.present[64:].all()
    assert not track.score[30:56].any()
    assert abs(middle(track.boxes)[32, 0] - 80) < 6  # held where it was last seen
    assert abs(middle(track.boxes)[-1, 0] - 150) < 4
    assert np.isfinite(track.boxes).all()


def test_a_stream_gives_what_an_array_gives():
    frames = face_video(20, lambda i: [(120, 90, 80)])
    a, b = track_face(frames), track_face(f for f in frames)
    assert np.array_equal(a.boxes, b.boxes)
    assert np.array_equal(crop_face(frames, a, 64), crop_face((f for f in frames), a, 64))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_framing(size):
    frames = face_video(15, lambda i: [(120, 90, 80)])
    crops = crop_face(frames, track_face(frames), size)
    assert crops.shape == (15, size, size, 3) and crops.dtype == np.uint8
    x, y, _, height, _ = detect_faces(crops[7])[0]
    assert np.abs(np.array([x, y]) / size - 0.5).max() < 0.04
    assert abs(height / size - 1 / CROP_SIDE) < 0.04


def test_framing_does_not_depend_on_the_video_size():
    small = face_video(15, lambda i: [(120, 90, 80)])
    large = np.stack([np.kron(f, np.ones((3, 3, 1), np.uint8)) for f in small])
    a, b = (crop_face(f, track_face(f), 64).astype(int) for f in (small, large))
    assert np.abs(a - b).mean() < 4


def test_a_crop_of_the_whole_is_the_whole():
    """Pixel centres: a crop as large as its result copies pixels."""
    frames = face_video(13, lambda i: [(120, 90, 80)])
    track = track_face(frames)
    side = 140
    half = side / CROP_SIDE / 2
    track.boxes[:] = [100 - half, 80 - half, 100 + half, 80 + half]
    assert np.abs(crop_face(frames, track, side)[0].astype(int) - frames[0, 10:150, 30:170]).max() <= 1


def test_edges_are_repeated():
    frames = face_video(15, lambda i: [(30, 30, 60)])
    frames[:, 0], frames[:, :, 0] = (9, 9, 9), (9, 9, 9)
    crops = crop_face(frames, track_face(frames), 64)
    assert (crops[:, 0, 0] == 9).all()


def test_same_frames_same_crops():
    frames = face_video(15, lambda i: [(100 + i, 90, 80)])
    a, b = (crop_face(frames, track_face(frames), 64) for _ in range(2))
    assert np.array_equal(a, b)


def test_refusals_name_the_video():
    noise = np.random.default_rng(0).integers(0, 256, (20, 120, 160, 3), np.uint8)
    with pytest.raises(InputError, match=r"^no face was found in REF.mp4: expected a video of one person facing"):
        track_face(noise, name="REF.mp4")
    brief = face_video(100, lambda i: [(120, 90, 80)] if i < 16 else [])
    with pytest.raises(InputError, match=r"most of REF.mp4: expected one in at least 20 of its 100 frames, got 1\d$"):
        track_face(brief, name="REF.mp4")
    with pytest.raises(InputError, match=rf"REF.mp4: expected a video of at least 0.5 s, got {MIN_FRAMES - 1} frame"):
        track_face(face_video(MIN_FRAMES - 1, lambda i: [(120, 90, 80)]), name="REF.mp4")
    tiny = np.full((13, 300, 300, 3), 120, np.uint8)
    for frame in tiny:
        draw_face(frame, 150, 150, 16)
    with pytest.raises(InputError, match=r"REF\.mp4"):
        track_face(tiny, name="REF.mp4")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the development clips are not on this machine")
@pytest.mark.parametrize("path", sorted(CLIPS.iterdir()) if CLIPS.is_dir() else [], ids=lambda p: p.name[-24:])
def test_real_clips(path):
    """Every development clip shows one person: found in every frame, framed alike, steady."""
    frames = read_video(path, max_seconds=1.2, max_side=480).frames
    track = track_face(frames, name=path.name)
    assert track.present.all()
    crop = crop_face(frames, track, 128)[len(frames) // 2]
    found = detect_faces(crop)
    assert len(found) == 1 and abs(found[0, 3] / 128 - 1 / CROP_SIDE) < 0.08
    assert np.abs(found[0, :2] / 128 - 0.5).max() < 0.1


@pytest.mark.parametrize("scale", [1, 4])  # 240x180, and 960x720, which is looked at smaller than it is cut
def test_read_face(tmp_path, scale):
    frames = face_video(20, lambda i: [(120 * scale, 90 * scale, 80 * scale)], 180 * scale, 240 * scale)
    with VideoWriter(tmp_path / "v.mp4", frames.shape[1:3], audio=(clicks(0.8, 16_000), 16_000)) as writer:
        writer.write(frames)
    clip = read_face(tmp_path / "v.mp4", 64)
    expected = crop_face(frames, track_face(frames), 64)
    assert clip.frames.shape == (20, 64, 64, 3) and clip.audio is not None and clip.audio.shape == (12_800,)
    assert np.abs(clip.frames.astype(int) - expected).mean() < 4
    assert len(read_face(tmp_path / "v.mp4", 64, max_seconds=0.6).frames) == 15
    with pytest.raises(InputError, match="expected a video of at least"):
        read_face(tmp_path / "v.mp4", 64, max_seconds=0.4)
