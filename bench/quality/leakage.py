"""Whether the reference's background shows in the generated scene.

Only what lies outside of the person is looked at: in each frame the head with its hair around the face box, and all
below the chin. Pictures are compared on a grid of 64, so that a codec's noise and a small camera shift weigh little.

Which degraded system must score worse than the true video (``REACTS``)::

    measure            frozen   other   shifted   blurred   drifting
    background_scene   -        yes     -         -         -      drifting colour moves it as far as it drifts
    background_leak    -        -       -         -         -      another case's video shows a third place; a video in
                                                                   the reference's place is what this is for
"""

from __future__ import annotations

import cv2
import numpy as np

from avatar_rt.scene.image import head_region
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.measure import Measure

MEASURES = (
    Measure("background_scene", "background as the given scene", "", "higher", "style"),
    Measure("background_leak", "reference's background in the scene", "", "target", "style", 0.0),
)
REACTS = {"background_scene": ("other",)}

GRID = 64
LEAST = 0.02  # of the grid must be background in both pictures
_SEEN = 0.2  # of the frames must show a piece of the background
_BELOW_CHIN = 0.05  # of the face's height: where shoulders may begin
_NOISE = 4.0  # grey levels: differences this small are the camera's and the codec's, and correlate with nothing
_FLAT = (0.03 * 255) ** 2  # the stabiliser of SSIM's terms: two flat pictures of one grey agree


def person(boxes: np.ndarray, height: int, width: int, grid: int = GRID) -> np.ndarray:
    """Where the person is or may be, for face boxes [F, 4] in pixels of height x width: bool [F, grid, grid]."""
    out = np.zeros((len(boxes), grid, grid), bool)
    scale = np.array([grid / width, grid / height] * 2)
    for mask, box in zip(out, boxes * scale, strict=True):
        x0, y0, x1, y1 = head_region(box, grid, grid)
        mask[y0:y1, x0:x1] = True
        mask[max(0, int(box[3] - _BELOW_CHIN * (box[3] - box[1]))) :] = True
    return out


def background(frames: np.ndarray, boxes: np.ndarray, grid: int = GRID) -> np.ndarray:
    """The still background behind a person: float64 [grid, grid, 3], NaN where the person nearly always is.

    Args:
        frames: uint8 [F, H, W, 3]; boxes: [F, 4], the face in each.

    Each pixel is the median over the frames in which the person is elsewhere, a fifth of them at least.
    """
    hidden = person(boxes, *frames.shape[1:3], grid)
    small = np.stack([_shrink(f, grid) for f in frames])
    seen = hidden.mean(0) <= 1 - _SEEN
    out = np.full(small.shape[1:], np.nan)
    values = np.where(hidden[:, seen, None], np.nan, small[:, seen])
    out[seen] = np.nanmedian(values, axis=0)
    return out


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Concordance of two pictures' values [N] in 0..255: 1 for equal ones, 0 for unrelated ones.

    (2 cov + C) / (var a + var b + (mean a - mean b)^2 + C), Lin's coefficient with SSIM's stabiliser
    C = (0.03 * 255)^2: unlike a correlation it sees a wrong brightness, and two plain walls of one colour agree.
    """
    cov = float(np.mean((a - a.mean()) * (b - b.mean())))
    return float((2 * cov + _FLAT) / (a.var() + b.var() + (a.mean() - b.mean()) ** 2 + _FLAT))


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Correlation of values ``a`` and ``b`` [N] after what ``given`` [N] explains of each (a line) is taken away.

    Each residual's variance counts _NOISE^2 more: where nothing but noise is left the result goes to 0, not to a
    correlation of noise.
    """
    basis = np.stack([given, np.ones_like(given)], axis=1)
    left = [v - basis @ np.linalg.lstsq(basis, v, rcond=None)[0] for v in (a, b)]
    spread = [np.mean(v**2) + _NOISE**2 for v in left]
    return float(np.mean(left[0] * left[1]) / np.sqrt(spread[0] * spread[1]))


def leakage(generated: np.ndarray, scene: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """MEASURES of three backgrounds, float64 [g, g, 3] each, NaN where unknown.

    Red, green and blue count as values of one picture: a plain wall is told from another by its colour.
    """
    nothing = {m.key: float("nan") for m in MEASURES}
    known = ~np.isnan(generated + scene).any(-1)
    if known.mean() < LEAST:
        return nothing
    out = nothing | {"background_scene": agreement(generated[known].ravel(), scene[known].ravel())}
    known &= ~np.isnan(reference).any(-1)
    if known.mean() >= LEAST:
        values = (v[known].ravel() for v in (generated, reference, scene))
        out["background_leak"] = partial_correlation(*values)
    return out


def prepare(case: Case, faces: Faces, context: Context) -> dict[str, np.ndarray]:
    """``background`` [g, g, 3] of the reference: the renderer's where there is one, else what is seen of it."""
    if "reference_background" in case.truth:
        return {"background": _shrink(case.truth["reference_background"])}
    return {"background": background(case.reference.frames, faces.boxes)}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """MEASURES of a video; NaN where the case gives no scene."""
    if case.scene is None:
        return {m.key: float("nan") for m in MEASURES}
    behind = context.facts(case, "leakage")["background"]
    return leakage(background(video.frames, faces.boxes), _shrink(case.scene), behind)


def _shrink(picture: np.ndarray, grid: int = GRID) -> np.ndarray:
    return cv2.resize(picture, (grid, grid), interpolation=cv2.INTER_AREA).astype(np.float64)
