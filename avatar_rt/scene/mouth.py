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


def mouth_move(frame: np.ndarray, pose: np.ndarray, other: np.ndarray, other_pose: np.ndarray) -> np.ndarray:
    """Where the face of one picture lies in another of the same person.

    Args:
        frame, other: uint8 [H, W, 3] face-centred crops.
        pose, other_pose: [62] their motion, in natural units.

    Returns: [3, 3] from pixels of ``other`` to pixels of ``frame``, the middle of the first at 0.
    """
    place = _placed(pose, frame.shape[1])
    return _refined(other, frame, place @ np.linalg.inv(_placed(other_pose, frame.shape[1])), place)


def enlarged(move: np.ndarray, scale: int) -> np.ndarray:
    """``move`` [3, 3] between pictures that are so many times larger."""
    larger = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
    return np.asarray(larger @ move @ np.linalg.inv(larger))


def put_mouth(frame: np.ndarray, pose: np.ndarray, other: np.ndarray, move: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3] of a person with the mouth of another, brought there by ``move`` [3, 3]."""
    height, width = frame.shape[:2]
    place = _placed(pose, width)
    reach = np.exp(pose[_SCALE]) * width * max(OVAL[2:]) * (1 + SOFT / 2) ** 0.5
    middle = place @ np.array([*OVAL[:2], 1])
    x0, y0 = (max(int(np.floor(v - reach)), 0) for v in middle[:2])
    x1, y1 = (min(int(np.ceil(v + reach)), most) for v, most in zip(middle[:2], (width, height), strict=True))
    out = frame.copy()
    if x1 <= x0 or y1 <= y0:
        return out
    here = np.array([[1, 0, -x0], [0, 1, -y0], [0, 0, 1]]) @ move
    size = (x1 - x0, y1 - y0)
    moved = cv2.warpAffine(other, here[:2], size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    y, x = np.mgrid[y0:y1, x0:x1] + 0.5
    back = np.linalg.inv(place)
    across, down = (back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in range(2))
    distance = ((across - OVAL[0]) / OVAL[2]) ** 2 + ((down - OVAL[1]) / OVAL[3]) ** 2
    share = np.clip((1 - distance) / SOFT + 0.5, 0, 1)[..., None]
    part = out[y0:y1, x0:x1]
    part[:] = (part * (1 - share) + moved * share).round().astype(np.uint8)
    return out


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
