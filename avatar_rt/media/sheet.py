"""A contact sheet: a video at one glance."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from avatar_rt.errors import InputError

_GAP = 4


def contact_sheet(frames: np.ndarray, columns: int, path: str | os.PathLike[str], *, rows: int = 1) -> Path:
    """Write ``rows`` x ``columns`` evenly spaced frames, first and last among them, as one PNG.

    Args:
        frames: uint8 [F, H, W, 3] RGB, F >= 1; with fewer frames than places the sheet is smaller.
        columns, rows: Pictures across and down.
        path: Ends in .png.

    Raises: InputError on other frames or an output that cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise InputError(f"frames: expected uint8 [F >= 1, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if columns < 1 or rows < 1:
        raise InputError(f"columns, rows: expected at least 1, got {columns}, {rows}")
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise InputError(f"{file}: expected a contact sheet ending in .png, got {file.suffix!r}")
    count = min(columns * rows, len(frames))
    columns = min(columns, count)
    height, width = frames.shape[1:3]
    down = -(-count // columns)
    sheet = np.full((down * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for place, index in enumerate(np.linspace(0, len(frames) - 1, count).round().astype(int)):
        y, x = place // columns * (height + _GAP), place % columns * (width + _GAP)
        sheet[y : y + height, x : x + width] = frames[index]
    data = cv2.imencode(".png", sheet[..., ::-1])[1]
    try:
        file.write_bytes(data.tobytes())
    except OSError as e:
        raise InputError(f"{file}: the contact sheet cannot be written there ({e.strerror})") from None
    return file
