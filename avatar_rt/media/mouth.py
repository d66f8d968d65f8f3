"""Cutting grey squares around mouths, for whatever reads lips: the sync scorer and its training."""

from __future__ import annotations

import cv2
import numpy as np

MOUTH_SIDE, MOUTH_DROP = 0.68, 0.30  # the crop's side and its centre's drop below the face box's, in box heights


def mouth_squares(boxes: np.ndarray) -> np.ndarray:
    """Face boxes [F, 4], hairline to chin -> centre x, y and side of the squares around the mouths, float64 [F, 3]."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    height = y1 - y0
    return np.stack(((x0 + x1) / 2, (y0 + y1) / 2 + MOUTH_DROP * height, MOUTH_SIDE * height), axis=1)


def cut_squares(frames: np.ndarray, to_frame: np.ndarray, pixels: int) -> np.ndarray:
    """Sample a grey square out of every frame.

    Args:
        frames: uint8 [F, H, W, 3] RGB, or grey [F, H, W].
        to_frame: float64 [F, 2, 3], from the square's coordinates (-0.5..0.5 to both sides) to pixels.

    Returns: float32 [F, pixels, pixels] in 0..255. Sampled finely and averaged where the square is being scaled down.
    """
    out = np.empty((len(frames), pixels, pixels), np.float32)
    scale = float(np.median(np.linalg.norm(to_frame[:, :, 0], axis=1))) / pixels
    fine = pixels * int(np.clip(np.ceil(scale), 1, 8))
    grid = np.array([[1 / fine, 0, 0.5 / fine - 0.5], [0, 1 / fine, 0.5 / fine - 0.5], [0, 0, 1]])
    for square, frame, matrix in zip(out, frames, to_frame, strict=True):
        grey = frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        cut = cv2.warpAffine(
            grey, matrix @ grid, (fine, fine), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        square[:] = cut if fine == pixels else cv2.resize(cut, (pixels, pixels), interpolation=cv2.INTER_AREA)
    return out


def mouth_crops(frames: np.ndarray, boxes: np.ndarray, pixels: int) -> np.ndarray:
    """uint8 [F, H, W, 3] and face boxes [F, 4] -> grey mouths, float32 [F, pixels, pixels] in 0..255."""
    x, y, side = mouth_squares(boxes).T
    to_frame = np.zeros((len(x), 2, 3))
    to_frame[:, 0, 0] = to_frame[:, 1, 1] = side
    to_frame[:, 0, 2], to_frame[:, 1, 2] = x - 0.5, y - 0.5  # pixel centres lie at whole numbers
    return cut_squares(frames, to_frame, pixels)
