"""A mouth taken from one picture to another: at its place, and nothing else with it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import ROOT

from avatar_rt.media.reader import read_video
from avatar_rt.models.motion import MOTION_NAMES, motion_index
from avatar_rt.scene.mouth import OVAL, enlarged, mouth_move, put_mouth

MIDDLE = (64, 64 + 128 * OVAL[1])  # of the oval, in a picture of 128


def _pose(**channels: float) -> np.ndarray:
    pose = np.zeros(len(MOTION_NAMES))
    for name, value in channels.items():
        pose[motion_index(name)] = value
    return pose


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return read_video(ROOT / "tests" / "data" / "cases" / "case-02" / "reference.mp4").frames[30]


def move_mouth(frame: np.ndarray, pose: np.ndarray, other: np.ndarray, other_pose: np.ndarray) -> np.ndarray:
    return put_mouth(frame, pose, other, mouth_move(frame, pose, other, other_pose))


def test_larger_pictures_move_alike(face: np.ndarray) -> None:
    """What was found in small pictures holds in larger ones of the same: middles of pixels, not corners, lie over each
    other."""
    other, pose = _shifted(face, 3, -2), _pose(translateX=3 / 128, translateY=-2 / 128)
    large, large_other = (cv2.resize(p, (256, 256), interpolation=cv2.INTER_CUBIC) for p in (face, other))
    move = mouth_move(face, _pose(), other, pose)
    assert np.allclose(enlarged(enlarged(move, 3), 1), enlarged(move, 3))
    assert np.allclose((enlarged(np.eye(3), 2) @ [5, 7, 1])[:2], (5, 7))
    assert _apart(put_mouth(large, _pose(), large_other, enlarged(move, 2)), large) < 0.25


def _shifted(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    move = np.array([[1, 0, x], [0, 1, y]], float)
    size = (picture.shape[1], picture.shape[0])
    return cv2.warpAffine(picture, move, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def test_only_the_mouth_is_taken(face: np.ndarray) -> None:
    green = face.copy()
    x, y = (round(v) for v in MIDDLE)
    green[y - 6 : y + 7, x - 6 : x + 7] = (0, 255, 0)
    green[:30] = 0
    out = move_mouth(face, _pose(), green, _pose())
    assert out.dtype == np.uint8 and out.shape == face.shape
    assert _apart(out[y - 4 : y + 5, x - 4 : x + 5], green[y - 4 : y + 5, x - 4 : x + 5]) < 8
    assert np.array_equal(out[:50], face[:50]) and np.array_equal(out[:, :30], face[:, :30])


@pytest.mark.parametrize(("told", "seen"), [(5.0, 5.0), (3.5, 5.0)])
def test_it_comes_to_where_the_face_is(face: np.ndarray, told: float, seen: float) -> None:
    """Also where the pose is not right to the pixel: the picture says the rest."""
    other, pose = _shifted(face, seen, -2), _pose(translateX=told / 128, translateY=-2 / 128)
    out = move_mouth(face, _pose(), other, pose)
    wrong = move_mouth(face, _pose(), _shifted(face, seen - told or 2, 0), _pose())
    assert _apart(out, face) < 0.25
    assert _apart(_shifted(face, 1.5, 0), face) > 4 * _apart(out, face) and wrong.shape == out.shape


def test_a_face_that_is_nearer_and_tilted_is_undone(face: np.ndarray) -> None:
    turn = cv2.getRotationMatrix2D((63.5, 63.5), 5.0, 1.05)  # anticlockwise in the picture, as a positive roll
    other = cv2.warpAffine(face, turn, (128, 128), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    out = move_mouth(face, _pose(), other, _pose(roll=np.radians(5.0), logScale=np.log(1.05)))
    assert _apart(out, face) < 0.5 < _apart(move_mouth(face, _pose(), np.zeros_like(other), _pose()), face)


def test_where_nothing_can_be_followed_the_poses_say_where() -> None:
    flat, other = np.full((128, 128, 3), 90, np.uint8), np.full((128, 128, 3), 90, np.uint8)
    x, y = (round(v) for v in MIDDLE)
    other[y - 4 : y + 5, x : x + 9] = 250  # four pixels to the right of the oval's middle
    out = move_mouth(flat, _pose(), other, _pose(translateX=4 / 128))
    bright = np.argwhere(out[..., 0] > 200).mean(0)
    assert np.allclose(bright, (y, x), atol=1)
