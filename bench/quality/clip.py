"""What is scored: a video with its sound, and the case it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [F, H, W, 3] at 25 fps, and sound fp32 [S] at 16 kHz in -1..1 or None."""

    frames: np.ndarray
    sound: np.ndarray | None = None


@dataclass(frozen=True)
class Faces:
    """The speaker's face in each of F frames.

    Attributes:
        boxes: float32 [F, 4], x0 y0 x1 y1 in pixels, hairline to chin, smoothed; held where no face was found.
        found: bool [F], whether the detector saw a face there. Frames it did not see are counted, never dropped.
    """

    boxes: np.ndarray
    found: np.ndarray


@dataclass(frozen=True)
class Case:
    """One case: what a system is given, and what its video is held against.

    Attributes:
        name: ``case-07``, or the stem of the clip's file name.
        kind: ``procedural`` (with truth) or ``real``.
        identity: Whose face it is; cases of one identity share it.
        reference: The person in another scene, saying something else.
        speech: fp32 [S] at 16 kHz: what the generated person says.
        scene: uint8 [H, W, 3] the place they say it in, without them; None where the reference's own place is used.
        target: The true video of that person saying it there, or None.
        truth: ``motion`` [F, 62], ``mouth`` [F], ``facebox`` [F, 4] of the target's frames; empty for real cases.
    """

    name: str
    kind: str
    identity: str
    reference: Clip
    speech: np.ndarray
    scene: np.ndarray | None = None
    target: Clip | None = None
    truth: dict[str, np.ndarray] = field(default_factory=dict)
