"""Where on the way from noise a model loses the person: ``python -m bench.quality.midway [--times 0,0.5,1]``.

The true latents and motion of each case's first chunk are noised to a time t and sampled on from there, as the engine
would have gone on: t = 0 is the VAE alone, t = 1 the engine's own start. Who is in the frames is measured as in
``tests/test_quality.py``. What falls from one time to the next is lost between them. The last line printed is one JSON
document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME, frames_of_latents
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.models.dit import with_masks
from avatar_rt.pipeline.decode import to_pictures
from avatar_rt.pipeline.denoise import Conditions, _guidance, solve
from avatar_rt.pipeline.reference import read_motion, to_video
from avatar_rt.pipeline.schedule import make_schedule
from bench.quality.cases import BAR_CASES, CASES, procedural, read_case
from bench.quality.clip import Case
from bench.quality.degraded import fitted
from bench.quality.embedders import Embedder, open_embedder
from bench.quality.identity import who

TIMES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Start:
    """The clean chunk of a case and the noise on it: latents [1, C, T, h, w], motion [1, T, M] or None; ``first`` is
    the latent before it, with which the decoder starts."""

    first: Tensor
    latents: Tensor
    noise: Tensor
    motion: Tensor | None
    motion_noise: Tensor | None


@torch.inference_mode()
def sampled_from(engine: AvatarEngine, case: Case, times: list[float], seed: int = 0) -> list[np.ndarray]:
    """Frames uint8 [4T, H, W, 3] of the chunk that begins at the second latent of the true video, one per time.

    Raises: InputError where the true video is missing or shorter than a chunk and a latent.
    """
    cfg = engine.config
    count, length = cfg.chunk.latents, frames_of_latents(cfg.chunk.latents + 1)
    if case.target is None or len(case.target.frames) < length:
        raise InputError(f"{case.name}: expected a true video of {length} frames")
    reference = engine.prepare(case.reference.frames, sound=case.reference.sound, cropped=True)
    scene = reference.scene if case.scene is None else engine.encode_scene(case.scene)
    text = engine.embed_text()
    sampling = dataclasses.replace(cfg.sampling, motion_temperature=1.0)  # what is noised to t has all its noise
    schedule = make_schedule(sampling, cfg.chunk, seed, has_text=False)
    start = _start(engine, case.target.frames[:length], schedule)
    sound = _sound(case.speech, 1, length, engine.speech.context)
    audio = engine.speech(torch.from_numpy(sound)[None], has_context=True)
    anchor = with_masks(scene.latent, cfg.dit, scene.kept, 0)
    given = Conditions(scene, audio, text, text)
    velocity = _guidance(engine.dit, schedule, schedule.passes, anchor, count, lambda: reference.cache, given)
    videos = []
    for begin in times:
        z, motion = torch.lerp(start.latents, start.noise, begin), start.motion
        if motion is not None and start.motion_noise is not None:
            motion = torch.lerp(motion, start.motion_noise, begin)
        solved = solve(velocity, cfg.dit, z, motion, [begin, *(t for t in schedule.times if t < begin)])
        assert solved is not None  # nobody cancels it
        z = solved.latents
        video = engine.vae.decode(engine.vae.denormalize(torch.cat([start.first, z], 2)))
        videos.append(to_pictures(video[0][:, 1:], 1).numpy())
    return videos


def _start(engine: AvatarEngine, frames: np.ndarray, schedule: Any) -> Start:
    cfg = engine.config
    video = to_video(fitted(engine, frames))
    latents = engine.vae.normalize(engine.vae.encode(video)[0].float())
    plan = schedule.plan(0)
    noise = schedule.noise(plan, 0, (cfg.dit.latent_channels, *cfg.latent_size)).transpose(0, 1)[None]
    motion = read_motion(video, engine.motion)[:, 1:] if cfg.dit.motion_dim else None
    motion_noise = schedule.noise(plan, 1, (cfg.dit.motion_dim,))[None] if cfg.dit.motion_dim else None
    return Start(latents[:, :, :1], latents[:, :, 1:], noise, motion, motion_noise)


def _sound(speech: np.ndarray, first: int, stop: int, context: tuple[int, int]) -> np.ndarray:
    """The samples of frames ``first`` to ``stop`` with the speech encoder's context, zeros beyond the ends."""
    wave = normalise_loudness(speech, SAMPLE_RATE)
    left, right = context
    low, high = first * SAMPLES_PER_FRAME - left, stop * SAMPLES_PER_FRAME + right
    inside = wave[max(low, 0) : high]
    before = max(-low, 0)
    return np.pad(inside, (before, high - low - before - len(inside)))


def measure(engine: AvatarEngine, cases: list[Case], times: list[float], embedder: Embedder) -> list[dict[str, float]]:
    """Per time: ``top1``, the share of cases whose face is nearest to their own reference; ``own``, its cosine to that;
    ``margin``, by how much that is more than to the nearest other's."""
    references, made = [], []
    for i, case in enumerate(cases):
        references.append(who(case.reference.frames, embedder))
        made.append([who(frames, embedder) for frames in sampled_from(engine, case, times, seed=i)])
        print(f"{case.name}: {i + 1} of {len(cases)}", file=sys.stderr, flush=True)
    rows, table = [], np.stack(references)
    for at, t in enumerate(times):
        alike = np.stack([m[at] for m in made]) @ table.T
        own, others = np.diag(alike), np.where(np.eye(len(table), dtype=bool), -np.inf, alike).max(1)
        rows.append({"t": t, "top1": float((own > others).mean()), "own": float(own.mean()),
                     "margin": float((own - others).mean())})  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.midway", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--times", default=",".join(map(str, TIMES)), help="flow times, 0 (data) to 1 (noise)")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--count", type=int, default=BAR_CASES)
    a = parser.parse_args(arguments)
    try:
        times = _times(a.times)
        if a.count < 2:
            raise InputError(f"count: expected 2 or more cases to tell apart, got {a.count}")
        cases = [read_case(path, seconds=4) for path in procedural(a.cases)[: a.count]]
        rows = measure(AvatarEngine(a.bundle), cases, times, open_embedder())
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    print(json.dumps({"cases": len(cases), "rows": rows}))
    return 0


def _times(text: str) -> list[float]:
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        times = []
    if not times or not all(0 <= t <= 1 for t in times):
        raise InputError(f"times: expected numbers from 0 to 1 with commas between them, got {text!r}")
    return times


if __name__ == "__main__":
    sys.exit(main())
