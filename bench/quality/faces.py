"""Where the speaker's face is in every frame, and the square around it that the engine itself would cut.

The engine's own tracker looks at every third frame and bridges what lies between; a score must know of each frame
whether a face was to be seen, so here every frame is looked at.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter1d, median_filter

from avatar_rt.config import FPS
from avatar_rt.errors import InputError
from avatar_rt.media.face import SMOOTH_PLACE, SMOOTH_SIZE, FaceTrack, crop_face, detect_faces
from avatar_rt.scene.image import NOMINAL_FACE
from bench.quality.clip import Faces

# Pixels of the longer side at which the detector looks, until it sees something: 192 suffices for a face that fills a
# crop and takes a third of 320's time; 800 is for a face far away in a large picture.
_SIDES = (192, 320)
_FAR_SIDE, _FAR_FROM = 800, 500
_BORDER = 0.3  # of the picture, repeated around it, for a face that fills it


def find_faces(frames: np.ndarray, fps: float = FPS) -> Faces:
    """The largest and most central face through a video, looked for in every frame.

    Args:
        frames: uint8 [F, H, W, 3]; crops of 64 pixels will do, they are enlarged first.
        fps: Frames per second, for what is set in seconds; of a few frames picked out of a video, their own rate.

    Returns: boxes smoothed in time and held where no face was found; where none was found at all, the place that a
        face-centred crop has its face, with ``found`` all False.
    Raises: InputError on an array of another kind.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise InputError(f"frames: expected uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    seen = _follow([_look(frame) for frame in frames], height, width, fps)
    found = np.array([box is not None for box in seen])
    if not found.any():
        nominal = np.array(NOMINAL_FACE, np.float32) * np.array([width, height, width, height], np.float32)
        return Faces(np.repeat(nominal[None], len(frames), 0), found)
    return Faces(_smooth(np.stack([box for box in seen if box is not None]), found, fps), found)


def crops(frames: np.ndarray, faces: Faces, size: int) -> np.ndarray:
    """uint8 [F, size, size, 3]: the steady square around the face, as the engine cuts a reference."""
    return crop_face(frames, FaceTrack(faces.boxes, faces.found.astype(np.float32), faces.found), size)


def _look(frame: np.ndarray) -> np.ndarray:
    """Faces of one picture, float32 [n, 4]: x and y of the centre, width, height."""
    far = (_FAR_SIDE,) if max(frame.shape[:2]) > _FAR_FROM else ()
    for side in (*_SIDES, *far):
        if len(found := detect_faces(frame, side)):
            return found[:, :4]
    edge = round(_BORDER * max(frame.shape[:2]))
    found = detect_faces(cv2.copyMakeBorder(frame, edge, edge, edge, edge, cv2.BORDER_REPLICATE), _SIDES[-1])
    return found[:, :4] - np.array([edge, edge, 0, 0], np.float32)


def _follow(found: list[np.ndarray], height: int, width: int, fps: float) -> list[np.ndarray | None]:
    """Of each frame's faces the one that continues the best face of the video, or None."""

    def weight(face: np.ndarray) -> float:
        off_centre = np.hypot(face[0] / width - 0.5, face[1] / height - 0.5)
        return float(face[3] / height * (1 - 0.7 * off_centre))

    best = [max(map(weight, faces), default=-1.0) for faces in found]
    start = int(np.argmax(best))
    path: list[np.ndarray | None] = [None] * len(found)
    if best[start] < 0:
        return path
    path[start] = max(found[start], key=weight)
    for way in (range(start + 1, len(found)), range(start - 1, -1, -1)):
        last, at = path[start], start
        for i in way:
            reach = 0.5 + abs(i - at) / fps  # of a face height; a face that was away may come back elsewhere
            near = [f for f in found[i] if _distance(f, last) < reach]
            if near:
                path[i] = last = min(near, key=lambda f: _distance(f, last))
                at = i
    return path


def _distance(face: np.ndarray, last: np.ndarray) -> float:
    """Between two faces, in heights of the larger; infinite where the sizes differ by more than two."""
    if not 0.5 < face[3] / last[3] < 2:
        return np.inf
    return float(np.hypot(*(face[:2] - last[:2])) / max(face[3], last[3]))


def _smooth(seen: np.ndarray, found: np.ndarray, fps: float) -> np.ndarray:
    """Boxes of the found frames [n, 4] -> corners float32 [F, 4]: linear between them, held outside of them."""
    # A median of three takes out single wild detections.
    steady = median_filter(seen, size=(3, 1), mode="nearest")
    every, at = np.arange(len(found)), np.flatnonzero(found)
    boxes = np.stack([np.interp(every, at, steady[:, i]) for i in range(4)], axis=1)
    boxes[:, :2] = gaussian_filter1d(boxes[:, :2], SMOOTH_PLACE * fps, axis=0, mode="nearest")
    boxes[:, 2:] = np.exp(gaussian_filter1d(np.log(boxes[:, 2:]), SMOOTH_SIZE * fps, axis=0, mode="nearest"))
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1).astype(np.float32)
