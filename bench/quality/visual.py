"""What the picture looks like: no-reference score, sharpness, flicker, consistency in time, and likeness to the truth.

All but likeness is measured on the face cut square at 256 pixels (one face height), so that videos of any size and
framing compare. A small video is enlarged for that and scores as soft as it then looks.

Which degraded system must score worse than the true video (``REACTS``)::

    measure            frozen   other   shifted   blurred   drifting
    brisque            -        -       -         yes       -
    sharpness          -        -       -         yes       -
    flicker            (best)   -       -         (better)  -      a frozen or blurred picture cannot flicker:
    warp_error         (best)   -       -         (better)  -      read beside motion_energy and sharpness
    motion_energy      yes      -       -         -         -
    still_frames       yes      -       -         -         -
    psnr, ssim         yes      yes     -         yes       yes
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from functools import cache

import cv2
import numpy as np

from avatar_rt.errors import UnsupportedError
from avatar_rt.media.face import CROP_SIDE
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.faces import crops, find_faces
from bench.quality.measure import Measure

MEASURES = (
    Measure("brisque", "BRISQUE of the face", "", "lower", "visual"),
    Measure("sharpness", "sharpness of the face", "grey levels", "higher", "visual"),
    Measure("flicker", "flicker of what stands still", "grey levels", "lower", "visual"),
    Measure("warp_error", "change that motion does not explain", "grey levels", "lower", "visual"),
    Measure("motion_energy", "motion over the true video's", "", "target", "visual", 1.0),
    Measure("still_frames", "frames that repeat the one before", "", "lower", "visual"),
    Measure("psnr", "PSNR to the true video", "dB", "higher", "visual"),
    Measure("ssim", "SSIM to the true video", "", "higher", "visual"),
)
REACTS = {
    "brisque": ("blurred",),
    "sharpness": ("blurred",),
    "motion_energy": ("frozen",),
    "still_frames": ("frozen",),
    "psnr": ("frozen", "other", "blurred", "drifting"),
    "ssim": ("frozen", "other", "blurred"),
}

SIZE = 256
PICKS = 8  # frames that BRISQUE and SSIM look at, evenly spaced: 40 ms each
STILL = 0.1  # grey levels of mean change below which a frame repeats the one before; a codec's leftovers stay below
_FLICKER_SIDE = 128
_STANDING = 0.3  # share of the pixels that count as standing still: those that slowly change least


def face_pictures(frames: np.ndarray, faces: Faces, size: int = SIZE) -> np.ndarray:
    """The square of one face height around the face, uint8 [F, size, size, 3]."""
    whole = round(size * CROP_SIDE)
    edge = (whole - size) // 2
    return crops(frames, faces, whole)[:, edge : edge + size, edge : edge + size]


def grey(frames: np.ndarray) -> np.ndarray:
    """uint8 RGB [F, H, W, 3] -> luma uint8 [F, H, W]."""
    return np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])


def picks(count: int, wanted: int = PICKS) -> np.ndarray:
    """Evenly spaced frame numbers, the first and the last among them, none twice."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def sharpness(luma: np.ndarray) -> np.ndarray:
    """Standard deviation of the Laplacian of each luma picture [F, H, W], grey levels [F]."""
    return np.array([cv2.Laplacian(p, cv2.CV_32F).std() for p in luma], np.float64)


def available() -> str | None:
    """None when all can be measured, else what to install."""
    found = importlib.util.find_spec("brisque") is not None
    return None if found else "the package brisque is not installed: pip install -e '.[test]'"


@cache
def _brisque() -> object:
    if (reason := available()) is not None:
        raise UnsupportedError(f"BRISQUE: {reason}")
    from brisque import BRISQUE

    return BRISQUE(url=False)


def brisque(pictures: np.ndarray) -> float:
    """BRISQUE (Mittal et al., TIP 2012) by package brisque: mean over uint8 [n, H, W, 3]; about 0 clean, 100 ruined.

    NaN where no picture has the texture that its statistics need. Raises: UnsupportedError without the package.
    """
    scorer = _brisque()
    textured = [p for p in pictures if p.std() > 1]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package's own, of NumPy
        scores = np.array([float(scorer.score(p)) for p in textured])  # type: ignore[attr-defined]
    scores = scores[np.isfinite(scores)]
    return float(scores.mean()) if len(scores) else float("nan")


def flicker(luma: np.ndarray) -> float:
    """What flickers where nothing moves: RMS over time of (x[t-1] - 2 x[t] + x[t+1]) / sqrt(6), luma [F, H, W].

    Noise of standard deviation s, fresh in each frame, gives s; a steady drift gives 0. Taken over the 30 % of the
    pixels whose average over five frames changes least. NaN below five frames.
    """
    if len(luma) < 5:
        return float("nan")
    x = np.stack([_fit(p, _FLICKER_SIDE) for p in luma]).astype(np.float32)
    sums = np.cumsum(x, axis=0, dtype=np.float64)
    slow = sums[4:] - np.concatenate([np.zeros_like(sums[:1]), sums[:-5]])
    calm = slow.std(0)
    fast = (x[:-2] - 2 * x[1:-1] + x[2:])[:, calm <= np.quantile(calm, _STANDING)] / np.sqrt(6)
    return float(np.sqrt(np.mean(fast.astype(np.float64) ** 2)))


def warp_error(luma: np.ndarray) -> float:
    """Mean absolute difference between each frame and the next one brought back along the optical flow, grey levels.

    As in Lai et al. (arXiv 1808.00449), with OpenCV's DIS flow. Left out is what gets covered, where the flows there
    and back disagree: |w + w'|^2 > 0.01 (|w|^2 + |w'|^2) + 0.5. NaN below two frames.
    """
    if len(luma) < 2:
        return float("nan")
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    small = [_fit(p, _FLICKER_SIDE) for p in luma]
    height, width = small[0].shape
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    errors = []
    for now, then in itertools.pairwise(small):
        there, back = solver.calc(now, then, None), solver.calc(then, now, None)
        at = grid + there
        back = cv2.remap(back, at, None, cv2.INTER_LINEAR)
        brought = cv2.remap(then, at, None, cv2.INTER_LINEAR)
        inside = (at >= 0).all(-1) & (at[..., 0] <= width - 1) & (at[..., 1] <= height - 1)
        moved = (there**2).sum(-1) + (back**2).sum(-1)
        seen = inside & (((there + back) ** 2).sum(-1) <= 0.01 * moved + 0.5)
        if seen.any():
            errors.append(np.abs(now.astype(np.float32) - brought)[seen].mean())
    return float(np.mean(errors)) if errors else float("nan")


def changes(luma: np.ndarray) -> np.ndarray:
    """Mean absolute change from each frame to the next, grey levels [F - 1]."""
    return np.array([cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(luma)])


def likeness(frames: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """PSNR in dB and SSIM (7 x 7 windows) of the frames that both have, after resizing ours to the target's size.

    The mean square error is taken over the video, and not below 1/12, what rounding to whole grey levels costs: so an
    exact copy has 58.9 dB, not infinity. SSIM is the mean of every 4th frame's.
    """
    from skimage.metrics import structural_similarity

    n, (height, width) = min(len(frames), len(target)), target.shape[1:3]
    ours = np.stack([_resize(f, width, height) for f in frames[:n]])
    error = float(np.mean([np.mean((a.astype(np.float32) - b) ** 2) for a, b in zip(ours, target[:n], strict=True)]))
    alike = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(ours[::4], target[:n:4], strict=True)]
    return {"psnr": float(10 * np.log10(255**2 / max(error, 1 / 12))), "ssim": float(np.mean(alike))}


def prepare(case: Case, faces: Faces, context: Context) -> dict[str, np.ndarray]:
    """``change``: that of the true video's face from frame to frame, or of the reference's where there is none."""
    if case.target is not None:
        return {"change": changes(grey(face_pictures(case.target.frames, find_faces(case.target.frames))))}
    return {"change": changes(grey(face_pictures(case.reference.frames, faces)))}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """MEASURES of a video; PSNR and SSIM are NaN where there is no true video."""
    pictures = face_pictures(video.frames, faces)
    luma = grey(pictures)
    moved, usual = changes(luma), context.facts(case, "visual")["change"]
    several = len(moved) > 0 and len(usual) > 0 and usual.mean() > 0
    out = {
        "brisque": brisque(pictures[picks(len(pictures))]),
        "sharpness": float(sharpness(luma).mean()),
        "flicker": flicker(grey(video.frames)),
        "warp_error": warp_error(luma),
        "motion_energy": float(moved.mean() / usual.mean()) if several else float("nan"),
        "still_frames": float(np.mean(moved < STILL)) if len(moved) else float("nan"),
        "psnr": float("nan"),
        "ssim": float("nan"),
    }
    return out if case.target is None else out | likeness(video.frames, case.target.frames)


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(picture.shape[:2])
    return picture if scale >= 1 else _resize(picture, *(round(n * scale) for n in picture.shape[1::-1]))


def _resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    smaller = width < picture.shape[1]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
