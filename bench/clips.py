"""Any folder of clips and any folder of speech: ``python -m bench.clips --clips DIR --speech DIR``.

Each clip is the reference once, driven by one speech file; it runs through, or is refused with its sentence. Reported
per clip: face similarity (cosine of dlib embeddings) of the generated video to its own reference crop, to the other
clips' on average, and of the reference's own two halves, as it is. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError
from avatar_rt.media.audio import normalise_loudness, read_audio
from bench.embed import FaceEmbedder, available

VIDEO = {".mp4", ".mpg", ".mov", ".mkv", ".avi", ".webm"}
SOUND = {".flac", ".wav", ".mp3", ".m4a", ".ogg"}


def run_clip(engine: AvatarEngine, clip: Path, speech: Path, seconds: float, **options: object) -> dict:
    """The clip's reference crops and its generated video, or the sentence that refused it."""
    try:
        reference = engine.prepare(clip)
        sound = read_audio(speech).samples[: round(seconds * SAMPLE_RATE)]
        session = engine.session(reference, **options)  # type: ignore[arg-type]
        session.push_audio(normalise_loudness(sound, SAMPLE_RATE))
        session.end_audio()
        return {"clip": clip.name, "reference": reference.frames, "video": np.concatenate(list(session.frames()))}
    except AvatarError as e:
        return {"clip": clip.name, "refused": str(e)}


def similarities(results: list[dict]) -> list[dict]:
    """One row a clip: ``own``, ``others`` and ``ceiling`` similarity, or the sentence that refused it."""
    embed = FaceEmbedder()
    ran = [r for r in results if "video" in r]
    refs = [embed.clip(r["reference"], 6)[0] for r in ran]
    rows = []
    for r in results:
        row = {"clip": r["clip"]}
        if "refused" in r:
            rows.append(row | {"refused": r["refused"]})
            continue
        i = next(k for k, other in enumerate(ran) if other is r)
        made, missed = embed.clip(r["video"], 6)
        own, others = float(made @ refs[i]), [float(made @ v) for k, v in enumerate(refs) if k != i]
        half = len(r["reference"]) // 2
        a, b = (embed.clip(part, 3)[0] for part in (r["reference"][:half], r["reference"][half:]))
        row |= {"frames": len(r["video"]), "faces_missed": missed, "own": own, "ceiling": float(a @ b)}
        row |= {"others": float(np.mean(others or [0])), "nearest_is_own": own > max(others, default=-1)}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.clips", description="Run a folder of clips.")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument(
        "--out", type=Path, help="also write a sheet, clips.png: reference at the left, generated beside"
    )
    args = parser.parse_args()
    if (reason := available()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    engine = AvatarEngine(args.bundle)
    clips = sorted(p for p in args.clips.iterdir() if p.suffix.lower() in VIDEO)
    speech = sorted(p for p in args.speech.iterdir() if p.suffix.lower() in SOUND)
    results = []
    for i, clip in enumerate(clips):
        results.append(run_clip(engine, clip, speech[i * len(speech) // len(clips)], args.seconds, steps=args.steps))
        told = results[-1].get("refused") or f"{len(results[-1]['video'])} frames"
        print(f"{i + 1}/{len(clips)} {clip.name}: {told}", file=sys.stderr, flush=True)
    rows = similarities(results)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        _sheet(results, args.out / "clips.png")
    print(f"{'clip':44} {'own':>6} {'others':>6} {'ceiling':>7}")
    for row in rows:
        figures = [row.get(k) for k in ("own", "others", "ceiling")]
        told = row.get("refused") or " ".join("     -" if v is None else f"{v:6.3f}" for v in figures)
        print(f"{row['clip'][:44]:44} {told}")
    print(json.dumps({"bundle": engine.bundle.weights_hash[:12], "clips": rows}))
    return 0


def _sheet(results: list[dict], path: Path, columns: int = 7, size: int = 128) -> None:
    import cv2

    rows = []
    for r in (r for r in results if "video" in r):
        picks = np.linspace(0, len(r["video"]) - 1, columns).round().astype(int)
        row = [r["reference"][0], *(r["video"][i] for i in picks)]
        rows.append(np.hstack([cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in row]))
    if rows:
        cv2.imwrite(str(path), np.vstack(rows)[..., ::-1])


if __name__ == "__main__":
    sys.exit(main())
