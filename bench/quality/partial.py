"""Videos from a model that is not finished: one that cannot hear yet, or has nobody to refer to.

A session expects all of it, and makes the videos of a finished model. For others the stages of the pipeline are called
here one by one with what the model was trained with; what it lacks is left out, as it was in its training.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, SAMPLES_PER_FRAME, SamplingConfig
from avatar_rt.engine import AvatarEngine
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.models.motion import ungroup_motion
from avatar_rt.pipeline.decode import decode_chunk, still_of
from avatar_rt.pipeline.denoise import ChunkState, Conditions, Scene, denoise_chunk
from avatar_rt.pipeline.reference import pack_cache, to_video
from avatar_rt.pipeline.schedule import GuidancePass, carried, guidance_passes, make_schedule
from bench.quality.clip import Case, Clip
from bench.quality.generate import moving


@dataclass(frozen=True)
class Sees:
    """What a model was trained with.

    Attributes:
        audio, reference: The driving speech; the reference clip.
        anchor: ``scene``, the place; ``picture``, a picture of the person, out of the reference; ``none``.
        caption: Whether the case's caption is its prompt.
    """

    audio: bool = True
    reference: bool = True
    anchor: str = "scene"
    caption: bool = False


@dataclass(frozen=True)
class Made:
    """A video, and the motion [F, 62] in natural units that the model generated with it; None without such a stream."""

    clip: Clip
    motion: np.ndarray | None


def passes(sampling: SamplingConfig, sees: Sees) -> tuple[GuidancePass, ...]:
    """The guidance of a complete model with the conditions that are not there taken out."""
    reference = sampling.reference_scale if sees.reference else 1.0
    audio = sampling.audio_scale if sees.audio else reference
    sampling = dataclasses.replace(sampling, reference_scale=reference, audio_scale=audio)
    summed: dict[tuple[bool, bool, bool, bool], tuple[float, float]] = {}
    for p in guidance_passes(sampling, sees.caption):
        key = (p.reference and sees.reference, p.audio and sees.audio, p.text and sees.caption, p.resting)
        weight, motion_weight = summed.get(key, (0.0, 0.0))
        summed[key] = (weight + p.weight, motion_weight + p.motion_weight)
    return tuple(
        GuidancePass(weight, *key, motion_weight)
        for key, (weight, motion_weight) in sorted(summed.items())
        if max(abs(weight), abs(motion_weight)) > 1e-9
    )


@torch.inference_mode()
def generate(
    engine: AvatarEngine, case: Case, sees: Sees, *, prompt: str = "", seed: int = 0, steps: int | None = None
) -> Made:
    """A case's video by a model that knows what ``sees`` says.

    Args:
        engine: Of a bundle whose configuration has the model's parts and no others.
        prompt: The caption, used where ``sees.caption``.
        steps: Of the solver; None takes the configuration's.
    """
    if sees == Sees():
        return Made(*moving(engine, case, seed=seed, steps=steps))
    cfg, per = engine.config, engine.config.dit.audio_per_latent
    sampling = cfg.sampling if steps is None else dataclasses.replace(cfg.sampling, steps=steps)
    whole = make_schedule(sampling, cfg.chunk, seed, has_text=False)
    schedule = dataclasses.replace(whole, passes=passes(sampling, sees), carried_passes=passes(carried(sampling), sees))
    person = engine.prepare(case.reference.frames, sound=case.reference.sound, cropped=True) if sees.reference else None
    cache = None if person is None else pack_cache(person.cache)
    place = case.scene if sees.anchor == "scene" else None
    likeness = None if person is None else engine.likeness(person, place, sampling.likeness)
    empty = engine.embed_text()
    text = engine.embed_text(prompt) if sees.caption else empty
    scene, dit = _anchor(engine, case, sees), _without(engine, sees)
    total = -(-len(case.speech) // SAMPLES_PER_FRAME)
    before = -schedule.frames_of(schedule.plan(0), per).start
    speech = _features(engine, case.speech, before, total + per * cfg.chunk.latents)
    state, decoder, index = ChunkState(), None, 0
    frames: list[np.ndarray] = []
    motion: list[Tensor] = []
    while sum(map(len, frames)) < total:
        plan = schedule.plan(index)
        heard = schedule.frames_of(plan, per)
        given = Conditions(scene, speech[:, before + heard.start : before + heard.stop], text, empty, likeness)
        done = denoise_chunk(  # type: ignore[arg-type, return-value]
            dit, cfg, schedule, plan, state, lambda: cache, given, still_of=functools.partial(still_of, engine.vae)
        )
        assert done is not None
        chunk, state = done
        pictures, decoder = decode_chunk(engine.vae, chunk, decoder, cfg.output_scale)
        frames.append(pictures.frames.numpy())
        motion += [] if chunk.motion is None else [chunk.motion]
        index += 1
    tokens = engine.motion.denormalize(ungroup_motion(torch.cat(motion, 1))) if motion else None
    told = None if tokens is None else tokens[0, :total].numpy()
    return Made(Clip(np.concatenate(frames)[:total], case.speech), told)


def caption(path: Path) -> str:
    """What a procedural case's target looks like, in words; empty where its description does not say."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    return str(meta.get("target", {}).get("caption", ""))


def _without(engine: AvatarEngine, sees: Sees) -> Any:
    """The transformer, not told what it was never told in training; as it is where there is nothing of that kind."""
    if sees.audio and sees.anchor != "none":
        return engine.dit

    def call(latents: Tensor, t: Tensor, text: Tensor, audio: Tensor | None = None, **told: Any) -> Any:
        if sees.anchor == "none":
            told = {k: v for k, v in told.items() if not k.startswith("anchor")}
        return engine.dit(latents, t, text, audio if sees.audio else None, **told)

    return call


def _anchor(engine: AvatarEngine, case: Case, sees: Sees) -> Scene:
    """The place, or the second latent of the reference: its first holds one frame and looks unlike the others."""
    if sees.anchor != "picture":
        place = case.scene if case.scene is not None else case.reference.frames[0]
        return engine.encode_scene(place)
    cfg = engine.config
    shown = [cv2.resize(f, (cfg.width, cfg.height), interpolation=cv2.INTER_AREA) for f in case.reference.frames[:5]]
    latents = engine.vae.normalize(engine.vae.encode(to_video(np.stack(shown)))[0].float())
    return Scene(latents[:, :, 1:2], torch.ones(1, 1, 1, *cfg.latent_size))


def _features(engine: AvatarEngine, speech: np.ndarray, before: int, num_frames: int) -> Tensor:
    """Features [1, before + num_frames, A] of the speech, ``before`` frames of silence, and the silence after it."""
    wave = np.zeros((before + num_frames) * SAMPLES_PER_FRAME, np.float32)
    shown = wave[before * SAMPLES_PER_FRAME :]
    sound = normalise_loudness(speech, SAMPLE_RATE)[: len(shown)]
    shown[: len(sound)] = sound
    return engine.speech(torch.from_numpy(wave)[None])
