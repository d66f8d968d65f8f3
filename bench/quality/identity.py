"""Is it the same face: ``python -m bench.quality.identity --cases DIR [--real DIR] [--embedder FILE.onnx]``.

Face similarity of a video: the cosine of each sampled frame's face embedding to the mean embedding of the reference,
then the 10 % trimmed mean (a tenth cut at each end). A frame in which no face is found is embedded where the face was
last, and counted: leaving it out would make the mean better. That mean falls where a face does more, for each frame is
held against an average: without the cut it is the cosine of the two videos' mean embeddings, times the length of the
video's, which says how alike its frames are. The cosine alone is given too; it is how two videos of a face are compared
in IJB-A (Klare et al., CVPR 2015). The command says how well the embedding tells people
apart: the area under the ROC curve of same against different people, rendered ones across scenes (reference against
target), real ones over two stretches of one clip. Its last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, trim_mean

from avatar_rt.config import FPS
from avatar_rt.errors import AvatarError, InputError
from bench.quality.cases import CASES, MANIFEST, procedural, read_case, read_halves, read_manifest
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.embedders import Embedder, available, open_embedder
from bench.quality.faces import crops, find_faces
from bench.quality.measure import Measure

FRAMES = 12  # of a video, evenly spaced: an embedding takes some 190 ms
TRIM = 0.1
BARS = {"procedural": 0.99, "real": 0.98}  # AUC of same against different people

MEASURES = (
    Measure("identity", "Face similarity to the reference", "cosine", "higher", "identity"),
    Measure("identity_template", "Mean face to the reference's mean", "cosine", "higher", "identity"),
    Measure("identity_worst", "Face similarity, worst frame", "cosine", "higher", "identity"),
    Measure("identity_margin", "Similarity over the nearest other reference", "cosine", "higher", "identity"),
    Measure("identity_top1", "Its own reference is the nearest", "share", "higher", "identity"),
    Measure("face_missed", "Frames without a face", "share", "lower", "identity"),
)


def sampled(num_frames: int, count: int | None = None) -> np.ndarray:
    """Indices of up to ``count`` evenly spaced frames, by default FRAMES."""
    return np.unique(np.linspace(0, num_frames - 1, count or FRAMES).round().astype(int))


def embed(frames: np.ndarray, faces: Faces, embedder: Embedder, count: int | None = None) -> np.ndarray:
    """Unit-length embeddings [n, D] of the ``sampled`` frames."""
    picks = sampled(len(frames), count)
    squares = crops(frames[picks], Faces(faces.boxes[picks], faces.found[picks]), embedder.side)
    return np.stack([embedder(square) for square in squares])


def mean_embedding(embeddings: np.ndarray) -> np.ndarray:
    """[n, D] -> the unit-length mean [D]."""
    mean = embeddings.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def who(frames: np.ndarray, embedder: Embedder, count: int = 8) -> np.ndarray:
    """The mean embedding of the face in ``count`` of the frames."""
    some = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return mean_embedding(embed(some, find_faces(some, fps=count / len(frames) * FPS), embedder, count))


def similarity(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """10 % trimmed mean of the frames' cosines to the mean reference embedding."""
    return float(trim_mean(embeddings @ reference, TRIM))


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """Chance that a pair of the same person is more alike than one of two people; ties count half."""
    if not len(same) or not len(different):
        return float("nan")
    ranks = rankdata(np.concatenate([same, different]))[: len(same)].sum()
    return float((ranks - len(same) * (len(same) + 1) / 2) / (len(same) * len(different)))


def prepare(case: Case, faces: Faces, context: Context) -> dict[str, np.ndarray]:
    """Of a reference: its mean embedding."""
    return {"embedding": mean_embedding(embed(case.reference.frames, faces, context.embedder))}


def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
    """The measures of one video. Those against other people's references are NaN where the set has none."""
    found = embed(video.frames, faces, context.embedder)
    reference = context.facts(case, "identity")["embedding"]
    own = similarity(found, reference)
    context.series["identity"] = np.full(len(video.frames), np.nan)
    context.series["identity"][sampled(len(video.frames))] = found @ reference
    others = [r.facts["identity"]["embedding"] for r in context.others(case)]
    nearest = max((similarity(found, other) for other in others), default=np.nan)
    return {
        "identity": own,
        "identity_template": float(mean_embedding(found) @ reference),
        "identity_worst": float((found @ reference).min()),
        "identity_margin": own - nearest,
        "identity_top1": float(own > nearest) if others else np.nan,
        "face_missed": float(1 - faces.found.mean()),
    }


def separation(first: list[np.ndarray], second: list[np.ndarray], people: list[str]) -> dict[str, float]:
    """How well embeddings [n, D] of two videos a person tell people apart: ``auc``, ``top1``, extremes of cosines."""
    a, b = (np.stack([mean_embedding(e) for e in part]) for part in (first, second))
    cosine = b @ a.T
    same = np.array([[p == q for q in people] for p in people])
    own = np.diag(cosine)
    apart = np.where(same, -np.inf, cosine).max(1)
    return {
        "auc": auc(own, cosine[~same]), "top1": float((own > apart).mean()), "same_lowest": float(own.min()),
        "different_highest": float(cosine[~same].max(initial=-1)), "videos": 2 * len(people),
        "people": len(set(people)),
    }  # fmt: skip


def _report(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], people: list[str], embedder: Embedder) -> dict:
    """Embeds pairs of frame arrays and says how they separate, misses included."""
    parts: tuple[list, list] = ([], [])
    looked = missed = 0
    for pair in pairs:
        for part, frames in zip(parts, pair, strict=True):
            picks = sampled(len(frames))
            faces = find_faces(frames[picks], FPS * len(picks) / len(frames))
            looked, missed = looked + len(picks), missed + int((~faces.found).sum())
            part.append(embed(frames[picks], faces, embedder))
    found = separation(*parts, people) | {"frames": looked, "frames_without_face": missed}
    verdict = "meets" if found["auc"] >= BARS[name] else "is below"
    print(
        f"{name}: {found['people']} people, AUC {found['auc']:.4f} ({verdict} {BARS[name]}), "
        f"top-1 {found['top1']:.0%}, same at least {found['same_lowest']:.3f}, "
        f"different at most {found['different_highest']:.3f}, no face in {missed} of {looked} frames"
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.identity", description="Same against different.")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--real", type=Path, help="folder of the clips that the manifest names")
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--embedder", type=Path, help="an ArcFace-class ONNX model; default: dlib's")
    a = parser.parse_args(arguments)
    try:
        if a.embedder is None and (reason := available()) is not None:
            raise InputError(reason)
        embedder = open_embedder(a.embedder)
        cases = [read_case(p, 8) for p in procedural(a.cases)]
        pairs = [(c.reference.frames, c.target.frames) for c in cases if c.target]
        results = {"procedural": _report("procedural", pairs, [c.identity for c in cases], embedder)}
        if a.real is not None:
            kept, refused = _real_pairs(a.manifest, a.real)
            results["real"] = _report("real", [p for p, _ in kept], [who for _, who in kept], embedder)
            results["real"]["refused"] = refused
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps({"embedder": embedder.name, **results}))
    return int(any(r["auc"] < BARS[name] for name, r in results.items()))


def _real_pairs(manifest: Path, folder: Path) -> tuple[list, list[str]]:
    kept, refused = [], []
    for row in read_manifest(manifest):
        try:
            kept.append((read_halves(folder, row), row.identity))
        except AvatarError as e:
            print(f"refused: {e}", file=sys.stderr)
            refused.append(str(e))
    if not kept:
        raise InputError(f"{folder}: holds none of the clips that {manifest} names")
    return kept, refused


if __name__ == "__main__":
    sys.exit(main())
