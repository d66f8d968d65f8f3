"""The scene image: a picture of the place, with the head's region blanked so that identity comes from the reference."""

from __future__ import annotations

import numpy as np

NOMINAL_FACE = (0.28, 0.21, 0.72, 0.79)  # where a face-centred crop has its face: x0, y0, x1, y1 in crop widths
BLANK = 127


def head_region(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels (x0, y0, x1, y1) of the head with its hair around a face box in pixels, clipped to the picture."""
    x0, y0, x1, y1 = (float(v) for v in box)
    w, h = x1 - x0, y1 - y0
    region = (x0 - 0.35 * w, y0 - 0.45 * h, x1 + 0.35 * w, y1 + 0.12 * h)
    low = [max(0, int(np.floor(v))) for v in region[:2]]
    return low[0], low[1], min(width, int(np.ceil(region[2]))), min(height, int(np.ceil(region[3])))


def blank_head(image: np.ndarray, box: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Blanks the head's region.

    Args:
        image: uint8 [H, W, 3].
        box: Face box in pixels; None takes the place a face-centred crop would have it.

    Returns: the blanked picture, and bool [H, W], True where the picture was kept.
    """
    height, width = image.shape[:2]
    if box is None:
        box = np.array(NOMINAL_FACE) * np.array([width, height, width, height])
    x0, y0, x1, y1 = head_region(box, height, width)
    kept = np.ones((height, width), bool)
    kept[y0:y1, x0:x1] = False
    blanked = image.copy()
    blanked[~kept] = BLANK
    return blanked, kept


def latent_mask(kept: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [H, W] pixels -> bool [height, width] latents, True only where every pixel was kept."""
    grid = kept.reshape(height, kept.shape[0] // height, width, kept.shape[1] // width)
    return np.asarray(grid.all(axis=(1, 3)))
