"""What creeps in over a video: slopes per 10 s of identity, colour, sharpness and sync.

A slope is Theil's and Sen's: the median of the slopes between all pairs of points, with the confidence interval that
comes with it (Sen, JASA 1968). The points are means over at least 0.4 s, so that they are nearly independent, and at
most 200, so that an hour takes no longer than a minute.

Which degraded system must score worse than the true video (``REACTS``)::

    measure                  frozen   other   shifted   blurred   drifting
    drift_identity           -        -       -         -         -      only for videos that lose the person
    drift_colour_face        -        -       -         -         yes
    drift_colour_background  -        -       -         -         yes
    drift_sharpness          -        -       -         -         -      only for videos that go soft or crisp
    drift_sync               -        -       -         -         -      only for videos whose sync runs away

A frozen picture drifts least of all; it is told by motion_energy.

``python -m bench.quality.drift VIDEO --reference REF`` prints the slopes of one video with their intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.stats import theilslopes

from avatar_rt.config import FPS
from avatar_rt.errors import InputError
from avatar_rt.media.reader import read_video
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.embedders import open_embedder
from bench.quality.faces import find_faces
from bench.quality.identity import embed, mean_embedding, sampled
from bench.quality.leakage import person
from bench.quality.measure import Measure
from bench.quality.visual import face_pictures, grey, sharpness

MEASURES = (
    Measure("drift_identity", "identity, change in 10 s", "cosine", "target", "drift", 0.0),
    Measure("drift_colour_face", "colour of the face, change in 10 s", "Lab", "lower", "drift"),
    Measure("drift_colour_background", "colour of the background, change in 10 s", "Lab", "lower", "drift"),
    Measure("drift_sharpness", "sharpness, change in 10 s", "of its mean", "target", "drift", 0.0),
    Measure("drift_sync", "sync, change in 10 s", "", "target", "drift", 0.0),
)
REACTS = dict.fromkeys(("drift_colour_face", "drift_colour_background"), ("drifting",))

SPAN = 10.0  # seconds that a slope is given over
MIN_POINTS = 5  # 2 s
LEAST_BACKGROUND = 0.02  # of the picture, in a frame
_POINT = round(0.4 * FPS)  # frames
_MOST_POINTS = 200
_GRID = 64
_INNER = 0.2  # of the face box is left out at each side: hair and what is behind


@dataclass(frozen=True)
class Slope:
    """Change in 10 s, with its 95 % interval; NaN where there are fewer than 5 points."""

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def slope(series: np.ndarray, rate: float = FPS) -> Slope:
    """The slope of a series [n] of ``rate`` values a second; NaN in it are moments without a value, however many."""
    if series.ndim != 1:
        raise InputError(f"series: expected one value a moment, got shape {list(series.shape)}")
    step = max(1, round(_POINT * rate / FPS), -(-len(series) // _MOST_POINTS))
    at, points = [], []
    for start in range(0, len(series) - step + 1, step):
        part = series[start : start + step]
        known = np.flatnonzero(~np.isnan(part))
        if len(known):
            at.append((start + known.mean()) / rate)
            points.append(part[known].mean())
    if len(points) < MIN_POINTS:
        return Slope(float("nan"), float("nan"), float("nan"))
    value, _, low, high = theilslopes(points, at, 0.95)
    return Slope(SPAN * float(value), SPAN * float(low), SPAN * float(high))


def colours(frames: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Mean CIE Lab of ``face`` and ``background`` in each frame of uint8 [F, H, W, 3]: float64 [F, 3] each.

    The face is the inner part of its box. The background is what leakage.person leaves, NaN where too little is left;
    it counts as each pixel's difference from its own median over time, so that a person who moves aside and shows more
    of it changes nothing.
    """
    hidden = person(boxes, *frames.shape[1:3], _GRID)
    scale = np.array([_GRID / frames.shape[2], _GRID / frames.shape[1]] * 2)
    small = (cv2.resize(f, (_GRID, _GRID), interpolation=cv2.INTER_AREA) for f in frames)
    lab = np.stack([cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for f in small])
    face, behind = np.full((len(frames), 3), np.nan), np.full((len(frames), 3), np.nan)
    for i, box in enumerate(boxes * scale):
        inset = _INNER * (box[2:] - box[:2])
        x0, y0, x1, y1 = np.clip(np.round([*(box[:2] + inset), *(box[2:] - inset)]), 0, _GRID).astype(int)
        if x1 > x0 and y1 > y0:
            face[i] = lab[i, y0:y1, x0:x1].mean((0, 1))
    enough = (~hidden).mean((1, 2)) >= LEAST_BACKGROUND
    if enough.any():
        ever = ~hidden[enough].all(0)
        known = np.where(hidden[enough][:, ever, None], np.nan, lab[enough][:, ever])
        usual = np.nanmedian(known, axis=0)
        behind[enough] = np.nanmean(known - usual, axis=1) + usual.mean(0)
    return {"face": face, "background": behind}


def slopes(video: Clip, faces: Faces, series: Mapping[str, np.ndarray] | None = None) -> dict[str, Slope]:
    """Slopes with intervals: lightness, a and b of face and background, sharpness in parts of its mean, and ``series``.

    Args:
        series: per-frame values [F] by name, such as ``identity`` (cosines) and ``sync``; NaN in frames without one.
    """
    out = {name: slope(values) for name, values in (series or {}).items()}
    for place, lab in colours(video.frames, faces.boxes).items():
        out |= {f"{place}_{axis}": slope(lab[:, i]) for i, axis in enumerate("Lab")}
    crisp = sharpness(grey(face_pictures(video.frames, faces)))
    return out | {"sharpness": slope(crisp / max(float(crisp.mean()), 1e-9))}


def values(found: Mapping[str, Slope]) -> dict[str, float]:
    """MEASURES of slopes: a colour's is the length of (L, a, b), the CIE76 difference that 10 s make."""
    nothing = Slope(float("nan"), float("nan"), float("nan"))
    out = {f"drift_{k}": found.get(k, nothing).value for k in ("identity", "sharpness", "sync")}
    for place in ("face", "background"):
        axes = [found.get(f"{place}_{axis}", nothing).value for axis in "Lab"]
        out[f"drift_colour_{place}"] = float(np.linalg.norm(axes))
    return {m.key: out[m.key] for m in MEASURES}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """MEASURES of a video; identity and sync are NaN where no earlier module put them into ``context.series``."""
    return values(slopes(video, faces, context.series))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.drift", description="Slopes of one video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="video of the person")
    a = parser.parse_args(arguments)
    embedder, series = open_embedder(), {}
    frames = read_video(a.reference).frames
    person_seen = mean_embedding(embed(frames, find_faces(frames), embedder))
    frames = read_video(a.video).frames
    faces = find_faces(frames)
    count = max(2 * len(frames) // FPS, 2)  # two embeddings a second
    series["identity"] = np.full(len(frames), np.nan)
    series["identity"][sampled(len(frames), count)] = embed(frames, faces, embedder, count) @ person_seen
    found = slopes(Clip(frames, None), faces, series)
    for name, s in found.items():
        print(f"{name}: {s.value:+.3f} in 10 s ({s.low:+.3f} to {s.high:+.3f})" + (" *" if s.significant else ""))
    print(json.dumps(values(found) | {"slopes": {k: asdict(s) for k, s in found.items()}}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
