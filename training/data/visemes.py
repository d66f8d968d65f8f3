"""From sounds to mouth shapes: a table of ARKit coefficients per phoneme, and how neighbours blend."""

from __future__ import annotations

import numpy as np

from avatar_rt.models.motion import ARKIT_NAMES
from training.data.phonemes import ID, PHONEMES, SILENCE

RATE = 100  # curves are laid out at 100 Hz

# Both sides of a pair are written once, without Left/Right. ``grip``: how firmly the shape holds its own.
_SHAPES: dict[str, dict[str, float]] = {
    "SIL": {},
    "AA": {"jawOpen": 0.52, "mouthLowerDown": 0.25, "mouthUpperUp": 0.10},
    "AE": {"jawOpen": 0.46, "mouthStretch": 0.22, "mouthLowerDown": 0.30, "mouthUpperUp": 0.20, "mouthSmile": 0.12},
    "AH": {"jawOpen": 0.32, "mouthLowerDown": 0.20, "mouthUpperUp": 0.08},
    "AO": {"jawOpen": 0.44, "mouthFunnel": 0.45, "mouthPucker": 0.15},
    "AW": {"jawOpen": 0.48, "mouthFunnel": 0.40, "mouthPucker": 0.12},
    "AY": {"jawOpen": 0.46, "mouthStretch": 0.18, "mouthLowerDown": 0.25, "mouthUpperUp": 0.12},
    "EH": {"jawOpen": 0.34, "mouthStretch": 0.22, "mouthLowerDown": 0.28, "mouthUpperUp": 0.16, "mouthSmile": 0.10},
    "ER": {"jawOpen": 0.22, "mouthFunnel": 0.35, "mouthPucker": 0.30},
    "EY": {"jawOpen": 0.28, "mouthStretch": 0.32, "mouthLowerDown": 0.28, "mouthUpperUp": 0.16, "mouthSmile": 0.18},
    "IH": {"jawOpen": 0.20, "mouthStretch": 0.24, "mouthLowerDown": 0.26, "mouthUpperUp": 0.12, "mouthSmile": 0.10},
    "IY": {"jawOpen": 0.14, "mouthStretch": 0.42, "mouthLowerDown": 0.30, "mouthUpperUp": 0.16, "mouthSmile": 0.25},
    "OW": {"jawOpen": 0.30, "mouthFunnel": 0.55, "mouthPucker": 0.40},
    "OY": {"jawOpen": 0.34, "mouthFunnel": 0.50, "mouthPucker": 0.30},
    "UH": {"jawOpen": 0.20, "mouthFunnel": 0.45, "mouthPucker": 0.40},
    "UW": {"jawOpen": 0.14, "mouthFunnel": 0.35, "mouthPucker": 0.80},
    "B": {"mouthPress": 0.45, "mouthRollLower": 0.25, "mouthRollUpper": 0.18, "grip": 6},
    "P": {"mouthPress": 0.50, "mouthRollLower": 0.28, "mouthRollUpper": 0.20, "grip": 6},
    "M": {"mouthPress": 0.35, "mouthRollLower": 0.22, "mouthRollUpper": 0.16, "grip": 6},
    "F": {"jawOpen": 0.07, "mouthRollLower": 0.65, "mouthUpperUp": 0.30, "grip": 4},
    "V": {"jawOpen": 0.07, "mouthRollLower": 0.58, "mouthUpperUp": 0.26, "grip": 4},
    "TH": {"jawOpen": 0.16, "tongueOut": 0.35, "mouthLowerDown": 0.18, "grip": 2},
    "DH": {"jawOpen": 0.16, "tongueOut": 0.25, "mouthLowerDown": 0.15, "grip": 1.5},
    "S": {"jawOpen": 0.06, "mouthStretch": 0.28, "mouthLowerDown": 0.34, "mouthUpperUp": 0.16, "grip": 2},
    "Z": {"jawOpen": 0.06, "mouthStretch": 0.26, "mouthLowerDown": 0.32, "mouthUpperUp": 0.15, "grip": 2},
    "SH": {"jawOpen": 0.10, "mouthFunnel": 0.62, "mouthPucker": 0.25, "mouthLowerDown": 0.25, "grip": 2.5},
    "ZH": {"jawOpen": 0.10, "mouthFunnel": 0.55, "mouthPucker": 0.25, "mouthLowerDown": 0.22, "grip": 2.5},
    "CH": {"jawOpen": 0.10, "mouthFunnel": 0.60, "mouthPucker": 0.22, "mouthLowerDown": 0.22, "grip": 2.5},
    "JH": {"jawOpen": 0.10, "mouthFunnel": 0.55, "mouthPucker": 0.22, "mouthLowerDown": 0.22, "grip": 2.5},
    "T": {"jawOpen": 0.10, "mouthLowerDown": 0.22, "mouthUpperUp": 0.08, "grip": 1},
    "D": {"jawOpen": 0.12, "mouthLowerDown": 0.22, "mouthUpperUp": 0.08, "grip": 1},
    "N": {"jawOpen": 0.12, "mouthLowerDown": 0.20, "grip": 0.8},
    "L": {"jawOpen": 0.20, "mouthLowerDown": 0.18, "grip": 0.9},
    "R": {"jawOpen": 0.14, "mouthFunnel": 0.40, "mouthPucker": 0.35, "grip": 1.2},
    "W": {"jawOpen": 0.08, "mouthFunnel": 0.25, "mouthPucker": 0.88, "grip": 2.5},
    "Y": {"jawOpen": 0.12, "mouthStretch": 0.34, "mouthSmile": 0.18, "mouthLowerDown": 0.2, "grip": 0.9},
    "K": {"jawOpen": 0.18, "grip": 0.6},
    "G": {"jawOpen": 0.18, "grip": 0.6},
    "NG": {"jawOpen": 0.16, "grip": 0.6},
    "HH": {"jawOpen": 0.22, "grip": 0.3},
}
CLOSED = frozenset(ID[p] for p in ("B", "P", "M"))


def _table() -> tuple[np.ndarray, np.ndarray]:
    shapes, grip = np.zeros((len(PHONEMES), len(ARKIT_NAMES))), np.ones(len(PHONEMES))
    for i, phoneme in enumerate(PHONEMES):
        for name, value in _SHAPES[phoneme].items():
            if name == "grip":
                grip[i] = value
                continue
            for full in (name, f"{name}Left", f"{name}Right"):
                if full in ARKIT_NAMES:
                    shapes[i, ARKIT_NAMES.index(full)] = value
    return shapes, grip


SHAPES, GRIP = _table()
"""float64 [40, 52] and [40]."""


def mouth_curves(phones: tuple[tuple[int, float, float], ...], seconds: float, lead: float, slack: float) -> np.ndarray:
    """Coefficients at RATE, float64 [seconds * RATE, 52].

    Every sound pulls towards its shape with a weight that falls off around its middle; the mouth follows the weighted
    mean. Args: ``lead``: seconds by which the mouth is ahead of the sound; ``slack``: width of the pull, 1 is usual.
    """
    times = (np.arange(round(seconds * RATE)) + 0.5) / RATE + lead
    weight = np.full((len(times), 1), 1e-4)
    total = np.zeros((len(times), len(ARKIT_NAMES)))
    for phone, start, end in phones:
        half = max(end - start, 0.02) / 2
        away = np.clip(np.abs(times - (start + end) / 2) - 0.5 * half, 0, None)
        if phone == SILENCE:
            away = np.clip(np.abs(times - (start + end) / 2) - max(half - 0.04, 0), 0, None)
        reach = (0.5 * half + 0.022) * slack
        pull = GRIP[phone] * np.exp(-((away / reach) ** 2))
        weight += pull[:, None]
        total += pull[:, None] * SHAPES[phone]
    return total / weight
