"""Motion read off a video with the engine's own motion encoder, and how the mouth follows the true one.

The encoder reads each face crop alone: 52 ARKit coefficients, rotation, translation and gaze. It is a reading, not the
truth: on held-out rendered people its jawOpen correlates with the true one at 0.90 and covers about 0.7 of its range.
So the true video does not score perfectly; what it scores is the ceiling, and the report shows it.

Which degraded system must score worse than the true video (``REACTS``)::

    measure            frozen   other   shifted   blurred   drifting
    mouth_r            yes      yes     -         -         -
    mouth_error        yes      yes     -         -         -
    jaw_velocity_r     yes      yes     -         -         -
    mouth_lag          -        -       -         -         -      for mouths that are late; NaN where nothing agrees
    mouth_r_other      -        -       -         -         -      what mouths have in common by chance: near 0 for all
    viseme_error       yes      yes     -         -         -

``shifted`` moves only the sound, so nothing here sees it: the mouth is held against the true mouth, not the sound.
"""

from __future__ import annotations

import numpy as np
import torch

from avatar_rt.errors import InputError
from avatar_rt.models.motion import ARKIT_NAMES, MotionEncoder, motion_index
from avatar_rt.pipeline.reference import to_video
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.faces import crops, find_faces
from bench.quality.measure import Measure

MEASURES = (
    Measure("mouth_r", "mouth opening against the true one", "", "higher", "motion"),
    Measure("mouth_error", "jaw opening, mean error", "ARKit", "lower", "motion"),
    Measure("jaw_velocity_r", "jaw velocity against the true one", "", "higher", "motion"),
    Measure("mouth_lag", "mouth behind the true one", "frames", "target", "motion", 0.0),
    Measure("viseme_error", "frames with another mouth shape", "", "lower", "motion"),
    Measure("mouth_r_other", "mouth opening against other cases' true ones", "", "target", "motion", 0.0),
)
REACTS = dict.fromkeys(("mouth_r", "mouth_error", "jaw_velocity_r", "viseme_error"), ("frozen", "other"))

MIN_FRAMES = 25  # of both traces, for a correlation to say anything
MIN_FOUND = 0.5  # of the frames must show a face, else nothing can be read
LAG_REACH = 15
_STILL = 0.01  # ARKit units: a jaw that moves less than this does not move
_LAG_MIN_R = 0.5  # somewhere within reach; 95 % of pairs of unrelated sentences of 4 s stay below
_BATCH = 64

# Mouth shapes that the encoder can tell apart, as directions in a few lip coefficients (sides averaged). Phonemes that
# look alike share one: closed m b p and silence; spread e i s t; open a; rounded and open o; rounded w u.
_LIPS = ("jawOpen", "mouthLowerDown", "mouthUpperUp", "mouthStretch", "mouthFunnel", "mouthPucker")
VISEMES = {
    "closed": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "spread": (0.24, 0.28, 0.15, 0.28, 0.0, 0.0),
    "open": (0.46, 0.27, 0.12, 0.10, 0.0, 0.0),
    "round open": (0.38, 0.0, 0.0, 0.0, 0.50, 0.25),
    "round": (0.12, 0.0, 0.0, 0.0, 0.40, 0.60),
}
_WEIGHT = np.array([1, 1, 0.5, 0.5, 1, 1])  # how much of each coefficient the encoder recovers
_FULL = 0.72  # length of the longest shape
_LEAST = 0.2  # a mouth whose wide shapes are shorter than this is taken as it is, not enlarged


@torch.inference_mode()
def read_motion(frames: np.ndarray, faces: Faces, encoder: MotionEncoder) -> np.ndarray:
    """uint8 [F, H, W, 3] and its faces -> motion float64 [F, 62], channels as avatar_rt.models.motion.MOTION_NAMES.

    Frames without a detected face are read where the face was last: a video that hides its face gets no better.
    """
    if len(frames) != len(faces.boxes):
        raise InputError(f"faces: expected one box for each of {len(frames)} frames, got {len(faces.boxes)}")
    pictures = to_video(crops(frames, faces, encoder.cfg.size))[0].transpose(0, 1)
    return torch.cat([encoder(part) for part in pictures.split(_BATCH)]).double().numpy()


def readable(faces: Faces) -> bool:
    """Whether enough frames show a face."""
    return len(faces.found) >= 1 and float(faces.found.mean()) >= MIN_FOUND


def both_sides(motion: np.ndarray, name: str) -> np.ndarray:
    """A coefficient of motion [F, 62] by name, the mean of its sides where it has two: [F]."""
    names = [n for n in (name, f"{name}Left", f"{name}Right") if n in ARKIT_NAMES]
    return np.mean([motion[:, motion_index(n)] for n in names or [name]], axis=0)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r over the common length; 0 where ``a`` stands still, NaN where ``b`` does or both are too short."""
    n = min(len(a), len(b))
    if n < MIN_FRAMES or np.std(b[:n]) == 0:
        return float("nan")
    a, b = a[:n] - np.mean(a[:n]), b[:n] - np.mean(b[:n])
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else 0.0


def lag(mouth: np.ndarray, truth: np.ndarray, reach: int = LAG_REACH) -> float:
    """Frames by which ``mouth`` is behind ``truth``: where their correlation peaks within +-reach.

    The peak is refined by a parabola through its neighbours. NaN where the correlation stays below 0.5.
    """
    n = min(len(mouth), len(truth))
    steps = np.arange(-reach, reach + 1)
    pairs = ((mouth[max(k, 0) : n + min(k, 0)], truth[max(-k, 0) : n - max(k, 0)]) for k in steps)
    r = np.array([correlation(a, b) for a, b in pairs])
    if np.isnan(r).all() or np.nanmax(r) < _LAG_MIN_R:
        return float("nan")
    i = int(np.nanargmax(r))
    if i in (0, len(r) - 1) or np.isnan(r[i - 1 : i + 2]).any():
        return float(steps[i])
    before, peak, after = r[i - 1 : i + 2]
    bend = before - 2 * peak + after
    return float(steps[i] + (0.5 * (before - after) / bend if bend < 0 else 0.0))


def visemes(motion: np.ndarray) -> np.ndarray:
    """Index into VISEMES of the nearest mouth shape in each frame of motion [F, 62]: int64 [F].

    Each lip coefficient counts from its own resting level and all are scaled so that the clip's wide shapes have the
    table's size: a smile is no viseme, and a mumbler says the same vowels with less of everything.
    """
    lips = np.stack([both_sides(motion, name) for name in _LIPS], axis=1)
    lips = lips - np.quantile(lips, 0.05, axis=0)
    lips /= max(float(np.quantile(np.linalg.norm(lips, axis=1), 0.9)), _LEAST) / _FULL
    shapes = np.array(list(VISEMES.values()))
    return np.argmin((((lips[:, None] - shapes) * _WEIGHT) ** 2).sum(-1), axis=1)


def viseme_error(read: np.ndarray, truth: np.ndarray) -> float:
    """Share of frames whose shape is none of the true one's in the frame before, the same and the next."""
    n = min(len(read), len(truth))
    if n < MIN_FRAMES:
        return float("nan")
    padded = np.pad(truth[:n], 1, mode="edge")
    return float(np.all([read[:n] != padded[k : k + n] for k in range(3)], axis=0).mean())


def mouth_measures(motion: np.ndarray, truth_motion: np.ndarray, truth_mouth: np.ndarray) -> dict[str, float]:
    """All of MEASURES but the last.

    Args:
        motion: [F, 62] read off the video.
        truth_motion, truth_mouth: [F, 62] and [F] of the true one. Only the first min(F) frames are compared.

    ``mouth_r`` is Pearson's r of the read jawOpen with the true lip opening, so blind to scale and offset.
    ``mouth_error`` is the mean absolute difference of the two jawOpen, each above its own 5 % quantile: an offset is
    forgiven, for faces rest differently, a scale is not, so a mumbling video has an error.
    """
    jaw, true_jaw = (m[:, motion_index("jawOpen")] for m in (motion, truth_motion))
    n = min(len(jaw), len(true_jaw))
    if n < MIN_FRAMES:
        return {m.key: float("nan") for m in MEASURES[:-1]}
    moves = np.std(jaw[:n]) >= _STILL
    open_, true_open = (j[:n] - np.quantile(j[:n], 0.05) for j in (jaw, true_jaw))
    return {
        "mouth_r": correlation(jaw, truth_mouth) if moves else 0.0,
        "mouth_error": float(np.abs(open_ - true_open).mean()),
        "jaw_velocity_r": correlation(np.diff(jaw[:n]), np.diff(true_jaw[:n])) if moves else 0.0,
        "mouth_lag": lag(jaw[:n], truth_mouth[:n]) if moves else float("nan"),
        "viseme_error": viseme_error(visemes(motion), visemes(truth_motion)),
    }


def prepare(case: Case, faces: Faces, context: Context) -> dict[str, np.ndarray]:
    """``motion`` [F, 62] and ``mouth`` [F] of the true video: the renderer's, else read off it; empty without one."""
    if "motion" in case.truth:
        return {name: case.truth[name].astype(np.float64) for name in ("motion", "mouth")}
    if case.target is None or not readable(seen := find_faces(case.target.frames)):
        return {}
    motion = read_motion(case.target.frames, seen, context.motion)
    return {"motion": motion, "mouth": motion[:, motion_index("jawOpen")]}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """MEASURES of a video; NaN where there is no truth or no face to read.

    ``mouth_r_other`` is the mean over all other cases' truths: well above zero it says that correlations with the own
    truth are worth less than they look.
    """
    out = {m.key: float("nan") for m in MEASURES}
    if not readable(faces):
        return out
    motion, truth = read_motion(video.frames, faces, context.motion), context.facts(case, "motion")
    if "mouth" in truth:
        out |= mouth_measures(motion, truth["motion"], truth["mouth"])
    others = [r.facts["motion"]["mouth"] for r in context.others(case) if "mouth" in r.facts.get("motion", {})]
    chance = [correlation(motion[:, motion_index("jawOpen")], mouth) for mouth in others]
    known = [r for r in chance if not np.isnan(r)]
    return out | {"mouth_r_other": float(np.mean(known)) if known else float("nan")}
