"""A mouth taken from one picture of a person to another: moved to where the face has it, and blended in.

Where two faces lie is known from their motion to a pixel or two; points on nose, cheeks and eyes, followed from one
picture to the other (Lucas and Kanade, 1981), say the rest.
"""

from __future__ import annotations

import cv2
import numpy as np

from avatar_rt.models.motion import motion_index

OVAL = (0.0, 0.2, 0.15, 0.17)  # of a standard face, from its middle in crop sizes: middle x, y, radii; mouth and chin
SOFT = 0.6  # of the squared radius: its edge
_POINTS = np.stack(np.meshgrid(np.linspace(-0.16, 0.16, 9), np.linspace(-0.14, 0.1, 7)), -1).reshape(-1, 2)
_LOOKED = 15 / 128  # of the picture: how large a square a point is known by
_ENOUGH = 8  # points
_GROWN, _MOVED = 0.1, 0.04  # more than that, of the size and of the picture, is not believed
_X, _Y, _SCALE, _ROLL = (motion_index(name) for name in ("translateX", "translateY", "logScale", "roll"))


def move_mouth(frame: np.ndarray, pose: np.ndarray, other: np.ndarray, other_pose: np.ndarray) -> np.ndarray:
    """A picture of a person with the mouth of another picture of the same.

    Args:
        frame, other: uint8 [H, W, 3] face-centred crops; the mouth is that of ``other``.
        pose, other_pose: [62] their motion, in natural units.

    Returns: uint8 [H, W, 3].
    """
    height, width = frame.shape[:2]
    place = _placed(pose, width)
    move = _refined(other, frame, place @ np.linalg.inv(_placed(other_pose, width)), place)
    size = (width, height)
    moved = cv2.warpAffine(other, move[:2], size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    back = np.linalg.inv(place)
    across, down = (back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in range(2))
    distance = ((across - OVAL[0]) / OVAL[2]) ** 2 + ((down - OVAL[1]) / OVAL[3]) ** 2
    share = np.clip((1 - distance) / SOFT + 0.5, 0, 1)[..., None]
    return np.asarray((frame * (1 - share) + moved * share).round().astype(np.uint8))


def _placed(pose: np.ndarray, width: int) -> np.ndarray:
    """From a standard face's coordinates (crop sizes, its middle 0) to a picture's pixels: [3, 3]."""
    size, turn = np.exp(pose[_SCALE]) * width, -pose[_ROLL]
    cos, sin = size * np.cos(turn), size * np.sin(turn)
    return np.array([[cos, -sin, (0.5 + pose[_X]) * width], [sin, cos, (0.5 + pose[_Y]) * width], [0, 0, 1]])


def _refined(source: np.ndarray, target: np.ndarray, move: np.ndarray, place: np.ndarray) -> np.ndarray:
    """``move`` [3, 3] from ``source`` to ``target``, put right by what is seen; as it is where too little is."""
    height, width = target.shape[:2]
    points = (_POINTS @ place[:2, :2].T + place[:2, 2]).astype(np.float32)
    moved = cv2.warpAffine(source, move[:2], (width, height), borderMode=cv2.BORDER_REPLICATE)
    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (target, moved)]
    side = max(round(_LOOKED * width) | 1, 5)
    found, known, _ = cv2.calcOpticalFlowPyrLK(
        grey[0], grey[1], points[:, None], None, winSize=(side, side), maxLevel=2
    )  # type: ignore[call-overload]
    good = known.ravel() == 1
    if good.sum() < _ENOUGH:
        return move
    fix, _ = cv2.estimateAffinePartial2D(
        found[good, 0], points[good], method=cv2.RANSAC, ransacReprojThreshold=width / 128
    )
    middle = np.array([width / 2, 0.6 * height])
    if fix is None or abs(np.linalg.norm(fix[:, 0]) - 1) > _GROWN:
        return move
    if np.abs(fix[:, :2] @ middle + fix[:, 2] - middle).max() > _MOVED * width:
        return move
    return np.vstack([fix, [0, 0, 1]]) @ move
