"""The held-out procedural cases: ``python -m bench.cases [--cases tests/data/cases] [--out DIR]``.

Each case is a reference clip, another sentence of the same voice, an empty scene, and the true video of that person
saying it there. Measured: how well the VAE keeps the true video; whether the generated face retrieves its own
reference; whether the generated mouth follows the true one and no other; whether the picture moves as a person does.
The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.media.audio import normalise_loudness, read_audio
from avatar_rt.media.reader import read_image, read_video
from avatar_rt.models.motion import motion_index
from avatar_rt.pipeline.reference import to_video
from bench.embed import FaceEmbedder, available

CASES = Path(__file__).parent.parent / "tests" / "data" / "cases"


@dataclass(frozen=True)
class Case:
    """One case, read: frames uint8 [F, H, W, 3] at 25 fps, sound fp32 at 16 kHz, true lip opening [F]."""

    name: str
    reference: np.ndarray
    reference_sound: np.ndarray
    target: np.ndarray
    speech: np.ndarray
    scene: np.ndarray
    mouth: np.ndarray


def read_case(path: Path) -> Case:
    reference = read_video(path / "reference.mp4")
    truth = np.load(path / "truth.npz")
    target = read_video(path / "target.mp4").frames
    n = min(len(target), len(truth["mouth"]))
    assert reference.audio is not None
    return Case(
        path.name, reference.frames, reference.audio, target[:n], read_audio(path / "speech.wav").samples,
        read_image(path / "scene.png"), truth["mouth"][:n].astype(np.float64),
    )  # fmt: skip


def generate(engine: AvatarEngine, case: Case, **options: object) -> np.ndarray:
    """The case's video at the model's own size, uint8 [F, h, w, 3]."""
    reference = engine.prepare(case.reference, sound=case.reference_sound, cropped=True)
    session = engine.session(reference, scene=case.scene, **options)  # type: ignore[arg-type]
    session.push_audio(normalise_loudness(case.speech, SAMPLE_RATE))
    session.end_audio()
    frames = np.concatenate(list(session.frames()))
    step = engine.config.output_scale
    if step > 1:  # undo the enlargement: the measures read the model's own pixels
        f, h, w, c = frames.shape
        frames = frames.reshape(f, h // step, step, w // step, step, c).mean((2, 4)).round().astype(np.uint8)
    return frames[: len(case.target)]


@torch.inference_mode()
def mouth_opening(engine: AvatarEngine, frames: np.ndarray) -> np.ndarray:
    """jawOpen as the motion encoder reads it off each frame, [F]."""
    pictures = to_video(frames)[0].transpose(0, 1)
    return engine.motion(pictures)[:, motion_index("jawOpen")].double().numpy()


@torch.inference_mode()
def through_vae(engine: AvatarEngine, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Frames encoded and decoded, uint8, and their PSNR in dB: the best that anything behind this VAE can show."""
    video = to_video(frames[: 1 + 4 * ((len(frames) - 1) // 4)])
    out = engine.vae.decode(engine.vae.encode(video)[0]).clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / (out - video).square().mean()))
    return ((out[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), psnr


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    n = min(len(a), len(b))
    a, b = a[:n] - a[:n].mean(), b[:n] - b[:n].mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else 0.0


def energy(frames: np.ndarray) -> float:
    """Mean absolute difference between neighbouring frames, in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


@dataclass(frozen=True)
class Scores:
    """Means over the cases; ``own`` and ``other`` are correlations of mouth opening with the truth.

    ``retrieval_top1_vae`` is the true videos' behind the VAE: what a perfect transformer would reach.
    ``energy_ratio`` is over the true video as the VAE shows it: the VAE takes camera noise away, which also moves.
    """

    cases: int
    vae_psnr_db: float
    retrieval_top1: float
    retrieval_top1_truth: float
    retrieval_top1_vae: float
    faces_missed: int
    mouth_r_own: float
    mouth_r_other: float
    mouth_r_truth: float
    energy_ratio_median: float
    energy_ratio_min: float
    still_frames: int
    seconds_per_case: float


def score(engine: AvatarEngine, cases: list[Case], videos: list[np.ndarray], seconds: float) -> Scores:
    """All measures over generated videos of the cases."""
    embed = FaceEmbedder()
    table = np.stack([embed.clip(c.reference)[0] for c in cases])

    def top1(clips: list[np.ndarray]) -> tuple[float, int]:
        found = [embed.clip(v) for v in clips]
        hits = [int(np.argmax(table @ v)) == i for i, (v, _) in enumerate(found)]
        return float(np.mean(hits)), sum(missed for _, missed in found)

    own_top1, missed = top1(videos)
    opening = [mouth_opening(engine, v) for v in videos]
    n = len(cases)
    grid = np.array([[correlation(opening[i], cases[j].mouth) for j in range(n)] for i in range(n)])
    kept = [through_vae(engine, c.target) for c in cases]
    ratios = [energy(v) / energy(truth) for v, (truth, _) in zip(videos, kept, strict=True)]
    still = sum(int((np.abs(np.diff(v.astype(np.int16), axis=0)).max((1, 2, 3)) == 0).sum()) for v in videos)
    return Scores(
        cases=n,
        vae_psnr_db=float(np.mean([psnr for _, psnr in kept])),
        retrieval_top1=own_top1,
        retrieval_top1_truth=top1([c.target for c in cases])[0],
        retrieval_top1_vae=top1([video for video, _ in kept])[0],
        faces_missed=missed,
        mouth_r_own=float(np.diag(grid).mean()),
        mouth_r_other=float(grid[~np.eye(n, dtype=bool)].mean()) if n > 1 else 0.0,
        mouth_r_truth=float(np.mean([correlation(mouth_opening(engine, c.target), c.mouth) for c in cases])),
        energy_ratio_median=float(np.median(ratios)),
        energy_ratio_min=float(np.min(ratios)),
        still_frames=still,
        seconds_per_case=seconds / n,
    )


def sheet(cases: list[Case], videos: list[np.ndarray], path: Path, columns: int = 8) -> None:
    """Two rows a case: truth above, generated below; the reference at the left."""
    import cv2

    rows = []
    for case, video in zip(cases, videos, strict=True):
        picks = np.linspace(0, len(video) - 1, columns).round().astype(int)
        for clip in (case.target, video):
            rows.append(np.hstack([case.reference[0], *(clip[min(i, len(clip) - 1)] for i in picks)]))
    picture = cv2.resize(np.vstack(rows), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), picture[..., ::-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cases", description="Score the held-out procedural cases.")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--out", type=Path, help="also write a sheet of truth above generated, cases.png")
    parser.add_argument("--count", type=int, help="only the first cases")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--reference-scale", type=float)
    parser.add_argument("--audio-scale", type=float)
    args = parser.parse_args()
    if (reason := available()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    engine = AvatarEngine(args.bundle)
    cases = [read_case(p) for p in sorted(args.cases.glob("case-*"))][: args.count]
    options = {k: getattr(args, k) for k in ("steps", "reference_scale", "audio_scale") if getattr(args, k) is not None}
    videos, started = [], time.monotonic()
    for i, case in enumerate(cases):
        videos.append(generate(engine, case, seed=i, **options))
        print(f"{case.name}: {len(videos[-1])} frames, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    scores = score(engine, cases, videos, time.monotonic() - started)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        sheet(cases, videos, args.out / "cases.png")
    for key, value in asdict(scores).items():
        print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}")
    print(json.dumps({"bundle": engine.bundle.weights_hash[:12], **asdict(scores)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
