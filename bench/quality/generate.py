"""A system's videos of the cases: ``python -m bench.quality.generate --cases DIR --out DIR [--bundle B]``.

DIR/NAME.mp4 per case, with its sound, at 25 fps: what any other system would hand in to be scored. With ``--real DIR``
the clips of the manifest instead. ``--systems truth,frozen,...`` writes the degraded copies (and ``vae``, the true
video behind the model's VAE), each into a folder of its name. A case that is refused leaves NAME.refused.txt with the
sentence. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from avatar_rt.config import FPS, SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.media.writer import VideoWriter
from bench.quality.cases import CASES, MANIFEST, Source, procedural, real_sources
from bench.quality.clip import Case, Clip
from bench.quality.degraded import DEGRADED, degrade, through_vae

SYSTEMS = (*DEGRADED, "vae")


def moving(engine: AvatarEngine, case: Case, **options: Any) -> tuple[Clip, np.ndarray | None]:
    """The engine's video of a case, as large as it would be written, and the motion [F, 62] that was generated with it
    in natural units; None where the model has no such stream. ``options`` as of ``AvatarEngine.session``."""
    reference = engine.prepare(case.reference.frames, sound=case.reference.sound, cropped=True)
    session = engine.session(reference, scene=case.scene, **options)
    session.push_audio(normalise_loudness(case.speech, SAMPLE_RATE))
    session.end_audio()
    frames, motion = [], []
    for pictures in session.frames():
        frames.append(pictures)
        motion += [] if session.stats.motion is None else [session.stats.motion]
    return Clip(np.concatenate(frames), case.speech), np.concatenate(motion) if motion else None


def generate(engine: AvatarEngine, case: Case, **options: Any) -> Clip:
    """The video of ``moving`` alone."""
    return moving(engine, case, **options)[0]


def own_pixels(engine: AvatarEngine, frames: np.ndarray) -> np.ndarray:
    """Undoes the enlargement of generated frames: uint8 [F, h, w, 3] at the model's own size."""
    f, h, w, c = frames.shape
    step = engine.config.output_scale
    parts = frames.reshape(f, h // step, step, w // step, step, c)
    return np.asarray(parts.mean((2, 4)).round().astype(np.uint8))


def write(path: Path, clip: Clip) -> None:
    """A clip with its sound as an mp4; odd sides are cut by a pixel."""
    height, width = (n // 2 * 2 for n in clip.frames.shape[1:3])
    sound = (clip.sound, SAMPLE_RATE) if clip.sound is not None else None
    with VideoWriter(path, (height, width), FPS, audio=sound) as file:
        file.write(clip.frames[:, :height, :width])


def another_person(sources: list[Source], index: int, identity: str) -> Case | None:
    """The next case of the set that shows somebody else and has a true video; None when there is none."""
    for step in range(1, len(sources)):
        try:
            case = sources[(index + step) % len(sources)].read()
        except AvatarError:  # it has a row of its own that says so
            continue
        if case.identity != identity and case.target is not None:
            return case
    return None


def chosen_sources(a: argparse.Namespace) -> list[Source]:
    """The cases that a command line asks for: ``--real`` the manifest's, else the procedural ones."""
    if a.real is not None:
        sources = real_sources(a.manifest, a.real, a.speech)
    else:
        sources = [Source(p, seconds=a.reference_seconds) for p in procedural(a.cases)]
    return sources[: a.count]


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``chosen_sources`` reads."""
    parser.add_argument("--cases", type=Path, default=CASES, help="folder of the procedural cases")
    parser.add_argument("--real", type=Path, help="folder of the clips that the manifest names, in place of --cases")
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--speech", type=Path, help="recordings that drive real clips without speech")
    parser.add_argument("--count", type=int, help="only the first cases")
    parser.add_argument("--reference-seconds", type=float, help="use so much of the procedural references: 1, 2, 4, 8")


def _made(a: argparse.Namespace, sources: list[Source]) -> Iterator[tuple[str, Path, Clip | str]]:
    """(case, file, its clip or the sentence that refused it) of every video that is asked for."""
    systems = a.systems.split(",") if a.systems else []
    if unknown := [s for s in systems if s not in SYSTEMS]:
        raise InputError(f"systems: expected some of {', '.join(SYSTEMS)}, got {', '.join(unknown)}")
    engine = AvatarEngine(a.bundle) if not systems or "vae" in systems else None
    options = {
        k: getattr(a, k) for k in ("steps", "reference_scale", "audio_scale", "likeness") if getattr(a, k) is not None
    }
    for i, source in enumerate(sources):
        try:
            case = source.read()
        except AvatarError as e:
            yield from ((source.name, a.out / s / f"{source.name}.mp4", str(e)) for s in systems or [""])
            continue
        for system in systems or [""]:
            path = a.out / system / f"{source.name}.mp4"
            try:
                if system == "vae" and case.target is not None:
                    assert engine is not None
                    clip = Clip(through_vae(engine, case.target.frames)[0], case.target.sound)
                elif system:
                    clip = degrade(
                        system, case, another_person(sources, i, case.identity) if system == "other" else None
                    )
                else:
                    assert engine is not None
                    clip = generate(engine, case, seed=i, **options)
                yield case.name, path, clip
            except AvatarError as e:
                yield case.name, path, str(e)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.generate", description="Make videos of the cases.")
    add_sources(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--systems", help=f"degraded copies in place of the engine's: some of {','.join(SYSTEMS)}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--reference-scale", type=float)
    parser.add_argument("--audio-scale", type=float)
    parser.add_argument("--likeness", type=float, nargs="*", help="as of avatar-rt generate; nothing after it: off")
    a = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    started, frames, refused = time.monotonic(), 0, {}
    try:
        for name, path, clip in _made(a, chosen_sources(a)):
            path.parent.mkdir(parents=True, exist_ok=True)
            told = path.with_suffix(".refused.txt")
            for old in (path, told):
                old.unlink(missing_ok=True)
            if isinstance(clip, str):
                refused[path.relative_to(a.out).with_suffix("").as_posix()] = clip
                told.write_text(clip + "\n")
            else:
                write(path, clip)
                frames += len(clip.frames)
            said = clip if isinstance(clip, str) else f"{len(clip.frames)} frames"
            print(f"{name}: {said}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps({"frames": frames, "seconds": round(time.monotonic() - started, 1), "refused": refused}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
