"""The true video, and copies of it with one thing wrong each: every measure must tell the copy that is its own.

All but ``vae`` need nothing but the case. ``vae`` is the true video as the model's own VAE shows it: what a perfect
transformer would reach.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch

from avatar_rt.config import FPS, SAMPLES_PER_FRAME
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import InputError
from avatar_rt.pipeline.reference import to_video
from bench.quality.clip import Case, Clip

SHIFT = 6  # frames by which the sound of ``shifted`` comes late
BLUR = 0.02  # standard deviation of ``blurred``, in picture widths
DRIFT = 0.1  # what red gains and blue loses per second in ``drifting``


def truth(clip: Clip) -> Clip:
    return clip


def frozen(clip: Clip) -> Clip:
    """The first frame throughout."""
    return Clip(np.repeat(clip.frames[:1], len(clip.frames), 0), clip.sound)


def shifted(clip: Clip, frames: int = SHIFT) -> Clip:
    """The sound comes so many frames late, silence before it; earlier for a negative number."""
    assert clip.sound is not None
    by, n = frames * SAMPLES_PER_FRAME, len(clip.sound)
    sound = np.pad(clip.sound, (max(by, 0), max(-by, 0)))
    return Clip(clip.frames, sound[:n] if by >= 0 else sound[-n:])


def blurred(clip: Clip) -> Clip:
    sigma = BLUR * clip.frames.shape[2]
    return Clip(np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in clip.frames]), clip.sound)


def drifting(clip: Clip) -> Clip:
    """Colours that turn warmer and warmer, as those of a video that is made chunk by chunk may."""
    time = np.arange(len(clip.frames), dtype=np.float32)[:, None, None, None] / FPS
    gain = 1 + time * np.array([DRIFT, 0, -DRIFT], np.float32)
    return Clip(np.clip(clip.frames * np.maximum(gain, 0) + 0.5, 0, 255).astype(np.uint8), clip.sound)


def other(clip: Clip, another: Case) -> Clip:
    """Another person's video under this case's sound; played to and fro where it is shorter."""
    assert another.target is not None
    frames = another.target.frames
    turn = 2 * len(frames) - 2
    at = np.arange(len(clip.frames)) % max(turn, 1)
    return Clip(frames[np.where(at < len(frames), at, turn - at)], clip.sound)


COPIES: dict[str, Callable[[Clip], Clip]] = {
    "truth": truth, "frozen": frozen, "shifted": shifted, "blurred": blurred, "drifting": drifting,
}  # fmt: skip
DEGRADED = ("truth", "frozen", "other", "shifted", "blurred", "drifting")
"""The systems of the ranking table, the true video first."""


def degrade(name: str, case: Case, another: Case | None = None) -> Clip:
    """One of DEGRADED of a case; ``other`` needs the case of another person. Raises InputError without a target."""
    if case.target is None:
        raise InputError(f"{case.name}: there is no true video to make {name!r} of")
    if name == "other":
        if another is None or another.identity == case.identity:
            raise InputError(f"{case.name}: 'other' needs the video of another person, the set has none")
        return other(case.target, another)
    if name not in COPIES:
        raise InputError(f"system: expected a folder of videos or one of {', '.join(DEGRADED)}, got {name!r}")
    return COPIES[name](case.target)


def fitted(engine: AvatarEngine, frames: np.ndarray) -> np.ndarray:
    """Frames at the model's own size, uint8 [F, h, w, 3]."""
    size = engine.config.width, engine.config.height
    return np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])


@torch.inference_mode()
def through_vae(engine: AvatarEngine, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Frames at the model's own size, encoded and decoded, uint8 [1 + 4k, h, w, 3], and their PSNR in dB."""
    video = to_video(fitted(engine, frames)[: 1 + 4 * ((len(frames) - 1) // 4)])
    out = engine.vae.decode(engine.vae.encode(video)[0]).clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / (out - video).square().mean()))
    return ((out[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), psnr
