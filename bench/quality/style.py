"""How a person talks: distributions of mouth, head and blinks in a video against those in the reference.

Everything here is a difference within a clip (a range, a speed, a count), never a level: a level read off a face is
partly the shape of that face, and a frozen picture would carry it over. On takes of rendered people who share a style,
levels of lip coefficients seemed the most personal of all when read (0.8 of their variance), and were the least so in
truth (0.06).

Even so, what is read is not style alone: of two people who open their mouths equally far, the encoder sees one open
further, in every clip of that one. Over the 36 cases true videos retrieve their reference's style with an area under
the curve of 0.84 when both are read, and of 0.74 when the video's is the renderer's truth; nods, pitch and yaw carry
most of the latter. The difference is the face's share. ``python -m bench.quality.style`` prints the first.

Distances are Wasserstein-1 between the two clips' frames, in units of what lies between two strangers (SPREAD): 0 is
the same distribution, 1 is somebody else's. A take of three seconds holds little style, so two true takes of one person
are at 0.5 to 0.9, not at 0.

Which degraded system must score worse than the true video (``REACTS``)::

    measure            frozen   other   shifted   blurred   drifting
    style_mouth        yes      yes     -         -         -
    style_mouth_speed  yes      yes     -         -         -
    style_yaw_speed, style_pitch_speed, style_roll_speed, style_nods
                       yes      -       -         -         -      weaker than chance between two takes of 3 s
    style_blinks       -        -       -         -         -      too few blinks in a few seconds to promise an order
    style_distance     yes      yes     -         -         -
    style_top1         -        -       -         -         -      0 or 1 a case: needs more cases than 36 for an order
    style_auc          -        -       -         -         -      of one case, a rank: 0.5 by chance
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.signal import butter, find_peaks, sosfiltfilt
from scipy.stats import wasserstein_distance

from avatar_rt.config import FPS
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.models.motion import motion_index
from bench.quality.cases import CASES, procedural, read_case
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.faces import find_faces
from bench.quality.measure import Measure
from bench.quality.motion import MIN_FRAMES, both_sides, read_motion, readable

MEASURES = (
    Measure("style_mouth", "mouth amplitude, distance to the reference", "strangers", "lower", "style"),
    Measure("style_mouth_speed", "mouth speed, distance to the reference", "strangers", "lower", "style"),
    Measure("style_yaw_speed", "yaw speed, distance to the reference", "strangers", "lower", "style"),
    Measure("style_pitch_speed", "pitch speed, distance to the reference", "strangers", "lower", "style"),
    Measure("style_roll_speed", "roll speed, distance to the reference", "strangers", "lower", "style"),
    Measure("style_nods", "nods (1-4 Hz), distance to the reference", "strangers", "lower", "style"),
    Measure("style_blinks", "blinks a second, difference to the reference", "1/s", "lower", "style"),
    Measure("style_blink_intervals", "seconds between blinks, distance to the reference", "s", "lower", "style"),
    Measure("style_distance", "style, mean distance to the reference", "strangers", "lower", "style"),
    Measure("style_top1", "style retrieves its own reference", "", "higher", "style"),
    Measure("style_auc", "others' references further in style than its own, share", "", "higher", "style"),
)
_WITH_MOUTH = ("style_mouth", "style_mouth_speed", "style_distance")
_HEAD = ("style_yaw_speed", "style_pitch_speed", "style_roll_speed", "style_nods")
REACTS = dict.fromkeys(_WITH_MOUTH, ("frozen", "other")) | dict.fromkeys(_HEAD, ("frozen",))

# Median Wasserstein-1 distance between takes of 77 frames of different rendered people, from the renderer's truth
# (`spread` over 902 of them). ARKit units, ARKit units and radians a second, radians.
SPREAD = {
    "mouth": 0.0587, "mouth_speed": 0.4, "yaw_speed": 0.0375, "pitch_speed": 0.0412, "roll_speed": 0.0178,
    "nods": 0.004,
}  # fmt: skip
# Weights of a style vector's entries (`calibrate` over the same people): the share of an entry's variance that is the
# person's (0.7 for the mouth, 0.6 to 0.7 for head speeds, 0.8 for nods, 0.1 for blinks), over its spread between takes.
WEIGHTS = (4.94, 5.16, 4.56, 2.49, 3.21, 2.62, 3.44, 1.61, 0.96)

NOD_BAND = (1.0, 4.0)  # Hz
BLINK_RISE = 0.25  # of eyeBlink above its usual level; the encoder sees 0.7 of a true blink's height
_BLINK_GAP = 4  # frames between two blinks at least
_SMOOTH = np.array([1, 4, 6, 4, 1]) / 16  # the encoder reads frame by frame, and differences enlarge its noise


def samples(motion: np.ndarray) -> dict[str, np.ndarray]:
    """The frames' values of each quantity of SPREAD, from motion [F, 62] at 25 fps: float64 [F] each.

    mouth: jawOpen above its 5 % quantile; *_speed: absolute change a second; nods: absolute pitch between 1 and 4 Hz.
    Raises: InputError on fewer than 25 frames.
    """
    if len(motion) < MIN_FRAMES:
        raise InputError(f"motion: expected at least {MIN_FRAMES} frames for a style, got {len(motion)}")
    jaw = _smooth(both_sides(motion, "jawOpen"))
    out = {"mouth": np.clip(jaw - np.quantile(jaw, 0.05), 0, None), "mouth_speed": _speed(jaw)}
    for axis in ("yaw", "pitch", "roll"):
        out[f"{axis}_speed"] = _speed(_smooth(motion[:, motion_index(axis)]))
    band = butter(2, NOD_BAND, "bandpass", fs=FPS, output="sos")
    out["nods"] = np.abs(sosfiltfilt(band, motion[:, motion_index("pitch")]))
    return out


def blinks(motion: np.ndarray) -> np.ndarray:
    """Frames at which the eyes are most closed in a blink: int64 [n].

    A blink is a peak of eyeBlink that rises BLINK_RISE above the clip's median and stands out by nearly as much.
    """
    lids = both_sides(motion, "eyeBlink")
    padded = np.pad(lids, 1, constant_values=lids.min())  # a blink that the clip begins or ends with is one too
    usual = float(np.median(lids))
    peaks, _ = find_peaks(padded, height=usual + BLINK_RISE, prominence=0.8 * BLINK_RISE, distance=_BLINK_GAP)
    return peaks - 1


def distances(motion: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """MEASURES between two motions [F, 62] and [G, 62], but for the retrieval.

    ``style_blink_intervals`` is NaN unless both blink three times; ``style_distance`` is the mean of the Wasserstein
    distances, blinks left out.
    """
    ours, theirs = samples(motion), samples(reference)
    out = {f"style_{k}": float(wasserstein_distance(ours[k], theirs[k]) / SPREAD[k]) for k in SPREAD}
    together = float(np.mean(list(out.values())))
    times = [blinks(m) / FPS for m in (motion, reference)]
    rates = [len(t) / (len(m) / FPS) for t, m in zip(times, (motion, reference), strict=True)]
    out["style_blinks"] = abs(rates[0] - rates[1])
    gaps = [np.diff(t) for t in times]
    enough = min(map(len, gaps)) >= 2
    out["style_blink_intervals"] = float(wasserstein_distance(*gaps)) if enough else float("nan")
    return out | {"style_distance": together}


def style_vector(motion: np.ndarray) -> np.ndarray:
    """float64 [9]: how far, how fast and how often, as logarithms where they are sizes; not yet weighted."""
    of = samples(motion)
    lips = _smooth(both_sides(motion, "mouthLowerDown"))
    sizes = [
        np.quantile(of["mouth"], 0.9), of["mouth_speed"].mean(), np.quantile(lips, 0.9) - np.quantile(lips, 0.1),
        of["yaw_speed"].mean(), of["pitch_speed"].mean(), of["roll_speed"].mean(),
        np.sqrt(np.mean(of["nods"] ** 2)), _smooth(motion[:, motion_index("pitch")]).std(),
    ]  # fmt: skip
    return np.array([*np.log(np.array(sizes) + 1e-3), len(blinks(motion)) / (len(motion) / FPS)])


def retrieval(vectors_a: np.ndarray, vectors_b: np.ndarray, weights: np.ndarray | tuple = WEIGHTS) -> dict[str, float]:
    """Whether clip i of ``vectors_a`` [N, 9] finds the same person's other clip among ``vectors_b`` [N, 9].

    Returns: ``style_top1``; ``style_chance`` 1/N; ``style_auc``: how often the own clip is nearer than a stranger's,
        0.5 by chance. Ties count as half. Rows with NaN count as misses.
    """
    if vectors_a.shape != vectors_b.shape or len(vectors_a) < 2:
        raise InputError(f"vectors: expected two alike [N >= 2, D], got {vectors_a.shape} and {vectors_b.shape}")
    a, b = vectors_a * np.asarray(weights), vectors_b * np.asarray(weights)
    away = np.linalg.norm(a[:, None] - b[None], axis=-1)
    away = np.where(np.isnan(away), np.inf, away)
    others = away[~np.eye(len(a), dtype=bool)].reshape(len(a), -1)
    top1 = float(np.mean((others > np.diag(away)[:, None]).all(1)))
    return {"style_top1": top1, "style_chance": 1 / len(a), "style_auc": _auc(away)}


def carries(motions_a: list[np.ndarray], motions_b: list[np.ndarray]) -> dict[str, float]:
    """By which quantities a person's two clips find each other among N people's: an area under the curve for each.

    0.5 where the own clip is as often further as nearer than a stranger's, 1 where it is always nearer.
    """
    ours, theirs = [samples(m) for m in motions_a], [samples(m) for m in motions_b]
    away = {k: np.array([[wasserstein_distance(a[k], b[k]) for b in theirs] for a in ours]) for k in SPREAD}
    rates = [np.array([len(blinks(m)) / len(m) for m in side]) for side in (motions_a, motions_b)]
    away["blinks"] = np.abs(rates[0][:, None] - rates[1][None])
    return {k: _auc(v) for k, v in away.items()}


def spread(motions: list[np.ndarray]) -> dict[str, float]:
    """SPREAD of a corpus: the median distance between neighbours of a list of different people's motions."""
    all_ = [samples(m) for m in motions]
    pairs = list(zip(all_, all_[1:] + all_[:1], strict=True))
    return {k: float(np.median([wasserstein_distance(a[k], b[k]) for a, b in pairs])) for k in SPREAD}


def calibrate(takes_a: np.ndarray, takes_b: np.ndarray) -> np.ndarray:
    """WEIGHTS from the style vectors [N, D] of two takes of N people each.

    With w the variance between takes and v that of all takes, sqrt(max(0, 1 - w / v) / w): differences count in units
    of what one person varies by, and the less the less of them is personal.
    """
    within = ((takes_a - takes_b) ** 2).mean(0) / 2
    total = np.concatenate([takes_a, takes_b]).var(0)
    return np.sqrt(np.maximum(0, 1 - within / np.maximum(total, 1e-12)) / np.maximum(within, 1e-12))


def prepare(case: Case, faces: Faces, context: Context) -> dict[str, np.ndarray]:
    """``motion`` [F, 62] read off the reference and its ``vector`` [9]; empty where it shows too little of a face."""
    if len(case.reference.frames) < MIN_FRAMES or not readable(faces):
        return {}
    motion = read_motion(case.reference.frames, faces, context.motion)
    return {"motion": motion, "vector": style_vector(motion)}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """MEASURES of a video against the case's reference; NaN where either shows too little of a face, or is too short.

    ``style_top1`` is 1 where the video's style is nearer to its own reference than to every other person's, else 0;
    ``style_auc`` is the share of the others that are further away, ties as half: its mean is ``retrieval``'s.
    """
    out, own = {m.key: float("nan") for m in MEASURES}, context.facts(case, "style")
    if len(video.frames) < MIN_FRAMES or not readable(faces) or not own:
        return out
    motion = read_motion(video.frames, faces, context.motion)
    out |= distances(motion, own["motion"])
    others = [r.facts["style"]["vector"] for r in context.others(case) if r.facts.get("style")]
    if others:
        away = np.array([np.linalg.norm((style_vector(motion) - v) * WEIGHTS) for v in (own["vector"], *others)])
        out["style_top1"] = float(away[0] < min(away[1:]))
        out["style_auc"] = _further(away[1:], away[:1])
    return out


def _smooth(x: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(x, len(_SMOOTH) // 2, mode="edge"), _SMOOTH, mode="valid")


def _speed(x: np.ndarray) -> np.ndarray:
    return np.abs(np.gradient(x)) * FPS


def _auc(away: np.ndarray) -> float:
    """How often the diagonal of distances [N, N] is below the rest of its row, ties as half."""
    others = away[~np.eye(len(away), dtype=bool)].reshape(len(away), -1)
    return _further(others, np.diag(away)[:, None])


def _further(others: np.ndarray, own: np.ndarray) -> float:
    """The share of ``others`` that are above ``own``, ties as half."""
    return float(np.mean((others > own) + 0.5 * (others == own)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.style", description="What carries a style.")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--bundle", type=Path, help="whose motion encoder reads; default: the shipped one")
    parser.add_argument("--reference-seconds", type=float, help="1, 2, 4 or 8; default: all")
    a = parser.parse_args(arguments)
    try:
        context = Context(a.bundle)
        read: tuple[list, list] = ([], [])
        for path in procedural(a.cases):
            case = read_case(path, a.reference_seconds)
            for side, clip in zip(read, (case.target, case.reference), strict=True):
                side.append(read_motion(clip.frames, find_faces(clip.frames), context.motion))
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    found = retrieval(*(np.stack([style_vector(m) for m in side]) for side in read))
    print(
        f"true videos retrieve the style of their own reference: top-1 {found['style_top1']:.0%} of {len(read[0])} "
        f"(chance {found['style_chance']:.1%}), AUC {found['style_auc']:.2f}"
    )
    by = carries(*read)
    for key, value in sorted(by.items(), key=lambda item: -item[1]):
        print(f"{key:12} AUC {value:.2f}")
    print(json.dumps({**found, "carries": by}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
