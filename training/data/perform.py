"""A talking style, and what it makes of a stretch of speech: mouth, head, eyes and brows, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avatar_rt.models.motion import ARKIT_NAMES, GAZE, ROTATION, motion_index
from training.data.speech import FPS, Utterance, is_vowel, loudness
from training.data.visemes import RATE, mouth_curves

_LOOK = 0.6  # radians of gaze at which an eyeLook coefficient is 1


@dataclass(frozen=True)
class Style:
    """How a person talks. Rates per second, angles in radians, times in seconds.

    Attributes:
        gain: mouth amplitude, 1 a mumble, 1.5 clear speech; lead: mouth ahead of sound; slack: sluggishness of the
            mouth; lopsided: left minus right.
        smile: constant smile; wide: constant stretch or (below 0) rounding.
        sway: [yaw, pitch, roll] of idle head motion; sway_speed; nod: dip on stressed syllables.
        blink: blinks; gaze: glances; brow: raises on stress.
    """

    gain: float
    lead: float
    slack: float
    lopsided: float
    smile: float
    wide: float
    sway: tuple[float, float, float]
    sway_speed: float
    nod: float
    blink: float
    gaze: float
    brow: float


def draw_style(rng: np.random.Generator) -> Style:
    return Style(
        gain=float(np.exp(rng.normal(0.45, 0.2))),
        lead=float(rng.uniform(0.06, 0.11)),
        slack=float(rng.uniform(0.85, 1.25)),
        lopsided=float(rng.normal(0, 0.08)),
        smile=float(rng.choice([0, 1]) * rng.uniform(0.05, 0.4)),
        wide=float(rng.normal(0, 0.08)),
        sway=(float(rng.uniform(0.03, 0.13)), float(rng.uniform(0.02, 0.07)), float(rng.uniform(0.01, 0.06))),
        sway_speed=float(rng.uniform(0.6, 1.6)),
        nod=float(rng.uniform(0, 0.10)),
        blink=float(rng.uniform(0.12, 0.6)),
        gaze=float(rng.uniform(0.3, 1.4)),
        brow=float(rng.uniform(0.05, 0.6)),
    )


def _drift(rng: np.random.Generator, frames: int, speed: float = 1.0) -> np.ndarray:
    """Smooth noise of about unit spread, [frames]."""
    t = np.arange(frames) / FPS
    rates = speed * np.geomspace(0.06, 1.6, 10)
    size = 1 / (1 + (rates / 0.35) ** 2)
    size *= rng.rayleigh(1, 10) / np.sqrt((size**2).sum())
    return (size[:, None] * np.sin(2 * np.pi * rates[:, None] * t + rng.uniform(0, 2 * np.pi, (10, 1)))).sum(0)


def _bump(t: np.ndarray, at: float, width: float) -> np.ndarray:
    return np.exp(-(((t - at) / width) ** 2))


def _stresses(track: Utterance, rng: np.random.Generator) -> list[float]:
    """Times of stressed syllables: vowels that are loud and long, with some chance."""
    level = loudness(track, RATE)
    vowels = [
        (a, b, level[int(a * RATE) : int(b * RATE) + 1].max(initial=0)) for p, a, b in track.phones if is_vowel(p)
    ]
    if not vowels:
        return []
    strong = np.array([(b - a) * v for a, b, v in vowels])
    bar = np.quantile(strong, 0.6)
    return [(a + b) / 2 for (a, b, _), s in zip(vowels, strong, strict=True) if s >= bar and rng.random() < 0.6]


def _mouth(track: Utterance, style: Style, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Coefficients [frames, 52]; louder speech opens wider, closures stay closed."""
    curves = mouth_curves(track.phones, frames / FPS, style.lead, style.slack)
    level = loudness(track, RATE)
    level = np.convolve(np.pad(level, 12, mode="edge"), np.hanning(25) / 12, mode="same")[12:-12][: len(curves)]
    usual = np.median(level[level > level.max() * 0.1]) + 1e-6
    ahead = int(style.lead * RATE)
    force = np.clip((np.roll(level, -ahead) / usual) ** 0.35, 0.6, 1.25)
    slow = np.interp(np.arange(len(curves)) / RATE, np.arange(frames) / FPS, _drift(rng, frames, 2.0))
    curves *= (force * style.gain * np.exp(0.12 * slow))[:, None]
    middles = ((np.arange(frames) + 0.5) / FPS * RATE).astype(int)
    kernel = np.array([0.25, 0.5, 0.25])  # the camera's exposure
    spread = [curves[np.clip(middles + d, 0, len(curves) - 1)] for d in (-1, 0, 1)]
    out = sum(k * s for k, s in zip(kernel, spread, strict=True))
    for i, name in enumerate(ARKIT_NAMES):
        if name.startswith("mouth") and name.endswith(("Left", "Right")):
            out[:, i] *= 1 + style.lopsided * (1 if name.endswith("Left") else -1)
    return out


def _blinks(rng: np.random.Generator, times: np.ndarray, rate: float, glances: list[float]) -> np.ndarray:
    count = rng.poisson(rate * times[-1])
    starts = list(rng.uniform(0, times[-1], count)) + [g for g in glances if rng.random() < 0.2]
    out = np.zeros_like(times)
    for start in starts:
        shut, hold, back = rng.uniform(0.06, 0.10), rng.uniform(0.01, 0.06), rng.uniform(0.12, 0.2)
        since = times - start
        out = np.maximum(out, np.interp(since, [-shut, 0, hold, hold + back], [0, 1, 1, 0], left=0, right=0))
    return out * rng.uniform(0.92, 1.0)


def _gaze(rng: np.random.Generator, times: np.ndarray, rate: float) -> tuple[np.ndarray, list[float]]:
    """Where the eyes look in the room, radians [frames, 2] right and down, and when they jump."""
    out, jumps, at = np.zeros((len(times), 2)), [], 0.0
    aim = rng.normal(0, [0.06, 0.03])
    while at < times[-1]:
        out[times >= at] = aim
        at += 0.15 + rng.exponential(1 / rate)
        jumps.append(at)
        aim = rng.normal(0, [0.05, 0.03]) if rng.random() < 0.55 else rng.normal([0, 0.03], [0.26, 0.12])
    return out, jumps


def perform(track: Utterance, style: Style, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Motion of a clip.

    Returns:
        motion: float32 [frames, 62] with the translation channels still 0, which depend on the camera.
        shift: float32 [frames, 3], the head's displacement in the mesh's units.
    """
    times = (np.arange(frames) + 0.5) / FPS
    motion = np.zeros((frames, 62))
    motion[:, :52] = _mouth(track, style, rng, frames)

    def add(name: str, value: np.ndarray | float) -> None:
        for full in (name, f"{name}Left", f"{name}Right"):
            if full in ARKIT_NAMES:
                motion[:, motion_index(full)] += value

    rounded = np.clip(motion[:, motion_index("mouthPucker")] + motion[:, motion_index("mouthFunnel")], 0, 1)
    smile = style.smile * np.clip(1 + 0.35 * _drift(rng, frames), 0, 2)
    add("mouthSmile", smile * (1 - 0.6 * rounded))
    add("cheekSquint", 0.35 * smile)
    add("mouthStretch" if style.wide > 0 else "mouthPucker", abs(style.wide))
    stresses = _stresses(track, rng)
    nods = sum((rng.uniform(0.4, 1.2) * _bump(times, s - 0.03, 0.13) for s in stresses), np.zeros(frames))
    rest = rng.normal(0, [0.10, 0.06, 0.04])
    for axis in range(3):
        turn = rest[axis] + style.sway[axis] * _drift(rng, frames, style.sway_speed)
        motion[:, ROTATION.start + axis] = turn + (style.nod * nods if axis == 1 else 0)
    motion[:, ROTATION] = np.clip(motion[:, ROTATION], [-0.5, -0.32, -0.3], [0.5, 0.35, 0.3])
    raises = sum(
        (rng.uniform(0.3, 1) * _bump(times, s, 0.22) for s in stresses if rng.random() < 0.5), np.zeros(frames)
    )
    add("browInnerUp", np.clip(style.brow * raises + 0.12 * _drift(rng, frames), 0, 0.9))
    add("browOuterUp", np.clip(0.7 * style.brow * raises + 0.08 * _drift(rng, frames), 0, 0.8))
    add("browDown", np.clip(0.15 * _drift(rng, frames) - 0.05, 0, 0.6))
    aim, jumps = _gaze(rng, times, style.gaze)
    eyes = np.clip(aim - motion[:, ROTATION][:, :2], [-0.5, -0.35], [0.5, 0.35])
    motion[:, GAZE] = np.tile(eyes, 2) + np.array([-0.02, 0, 0.02, 0])
    _lids(motion)
    add("eyeBlink", _blinks(rng, times, style.blink, jumps))
    add("eyeSquint", 0.3 * smile + np.clip(0.1 * _drift(rng, frames), 0, 1))
    motion[:, :52] = np.clip(motion[:, :52], 0, 1)
    shift = np.stack([_drift(rng, frames, style.sway_speed) for _ in range(3)], 1) * [0.035, 0.02, 0.08]
    shift[:, 0] += 0.25 * motion[:, ROTATION.start]  # turning carries the head along
    return motion.astype(np.float32), shift.astype(np.float32)


def _lids(motion: np.ndarray) -> None:
    """The lids follow the gaze: eyeLook coefficients from the gaze angles."""
    for side, outward, start in (("Left", 1, GAZE.start), ("Right", -1, GAZE.start + 2)):
        right, down = motion[:, start] / _LOOK, motion[:, start + 1] / _LOOK
        for name, value in (("Out", outward * right), ("In", -outward * right), ("Down", down), ("Up", -down)):
            motion[:, motion_index(f"eyeLook{name}{side}")] = np.clip(value, 0, 1)
