"""Who is who, and where: pairs of clips of one person in two scenes, ``python -m training.data.pairs --corpus DIR``.

Rendered clips carry labels. Of real ones the graph is made: two clips show one person where their face embeddings are
near; they are a pair where their places differ besides, and both are long enough to show how the person moves. The
embeddings were stored when the clips were prepared, by whatever callable was given then. All clips of one person get
one identity, so that no one is both in training and held out, and move into one shard with the keys of their siblings.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from avatar_rt.config import FPS
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.scene.image import head_region
from training.data.shards import FOLDER, Index, Sample, Shard, read_index, read_shard, write_index, write_shard

FACE_MIN = 0.87
PLACE_MAX = 0.5
MIN_SECONDS = 2.0
SHARD_CLIPS = 50
_GRID = (4, 6)  # cells of a place's descriptor, down and across
_SCALE = 20.0  # of 255: so unlike in colour a cell is where the similarity has fallen to 1/e
_BLOCK = 2048


@dataclass(frozen=True)
class Graph:
    """Of N clips: ``person`` int64 [N], equal for one person, the lowest index among them; ``edges`` pairs (i < j)."""

    person: np.ndarray
    edges: tuple[tuple[int, int], ...]


def identity_graph(
    faces: np.ndarray,
    places: np.ndarray,
    seconds: np.ndarray,
    *,
    face_min: float = FACE_MIN,
    place_max: float = PLACE_MAX,
    min_seconds: float = MIN_SECONDS,
) -> Graph:
    """Persons and pairs among clips.

    Args:
        faces: [N, D] unit vectors; places: [N, K] of ``describe_place``; seconds: [N].
        face_min: cosine from which two faces are one person. It belongs to the embedder. Our own, which has seen
            rendered people only, gave 0.90 and more within real videos and up to 0.84 for two people in one studio:
            0.87 lies between, with little room. Networks made for real faces separate better, each at its own value.
        place_max: similarity up to which two places are two; one place within a video gave 0.69 and more, mostly 0.9.
        min_seconds: shorter clips belong to a person, but to no pair.

    Raises: InputError on arrays that do not fit together.
    """
    n = len(faces)
    if faces.ndim != 2 or places.ndim != 2 or len(places) != n or seconds.shape != (n,):
        raise InputError(f"identity_graph: expected faces [N, D], places [N, K] and seconds [N], got "
                         f"{list(faces.shape)}, {list(places.shape)} and {list(seconds.shape)}")  # fmt: skip
    parent, edges = np.arange(n), []
    for i, j in _near(faces, face_min):
        a, b = _root(parent, i), _root(parent, j)
        parent[max(a, b)] = min(a, b)
        long = min(seconds[i], seconds[j]) >= min_seconds
        if long and place_similarity(places[i], places[j]) <= place_max:
            edges.append((i, j))
    return Graph(np.array([_root(parent, i) for i in range(n)], np.int64), tuple(edges))


def _near(faces: np.ndarray, least: float) -> Iterator[tuple[int, int]]:
    """Pairs i < j whose cosine is at least so much, in blocks: N^2 numbers never lie in memory together."""
    for a in range(0, len(faces), _BLOCK):
        for b in range(a, len(faces), _BLOCK):
            rows, columns = np.nonzero(faces[a : a + _BLOCK] @ faces[b : b + _BLOCK].T >= least)
            for i, j in zip((rows + a).tolist(), (columns + b).tolist(), strict=True):
                if i < j:
                    yield i, j


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def describe_place(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What is behind a person: mean colour and its spread in a grid of cells, without the head and all below it.

    Args:
        picture: uint8 [H, W, 3] RGB; box: [4], the face in its pixels.

    Returns: float32 [4 * 6 * 4], Lab mean and spread of lightness per cell; NaN where little but the person is seen.
    """
    height, width = picture.shape[:2]
    kept = np.ones((height, width), bool)
    x0, y0, x1, y1 = head_region(box, height, width)
    shoulder = int(0.5 * (x1 - x0))
    kept[y0:y1, x0:x1] = False
    kept[y1:, max(x0 - shoulder, 0) : x1 + shoulder] = False
    lab = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2LAB).astype(np.float32)
    out = np.full((*_GRID, 4), np.nan, np.float32)
    for i, rows in enumerate(np.array_split(np.arange(height), _GRID[0])):
        for j, columns in enumerate(np.array_split(np.arange(width), _GRID[1])):
            cell = kept[np.ix_(rows, columns)]
            if cell.mean() > 0.3:
                colours = lab[np.ix_(rows, columns)][cell]
                out[i, j] = [*colours.mean(0), colours[:, 0].std()]
    return out.reshape(-1)


def place_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """1 for the same place, towards 0 for others; 1 too where too little of both is seen to tell them apart."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 4 * 4:
        return 1.0
    return float(np.exp(-np.abs(a[both] - b[both]).mean() / _SCALE))


def identity_of(key: str) -> int:
    """A number for a person, from the key of one of their clips; the same on every run."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def pair_corpus(corpus: Path, **thresholds: float) -> Graph:
    """Makes the graph of the clips that carry ``face`` and ``place`` and writes the corpus's shards anew, by person.

    Raises: ArtifactError as ``read_index`` and ``read_shard``; InputError where no clip carries an embedding.
    """
    folder = corpus / FOLDER
    index, where, metas = read_index(folder), [], []
    for shard in index.shards:
        for row, sample in enumerate(read_shard(folder, shard)):
            where.append((shard, row))
            metas.append((sample.key, sample.meta, len(sample.motion) / FPS))
    real = [i for i, (_, meta, _) in enumerate(metas) if meta.get("face") is not None]
    if not real:
        raise InputError(f"{folder}: expected clips with a face embedding (from identity weights), got none")
    graph = identity_graph(
        np.array([metas[i][1]["face"] for i in real], np.float32), np.array([_place(metas[i][1]) for i in real]),
        np.array([metas[i][2] for i in real]), **thresholds,
    )  # fmt: skip
    siblings: dict[int, list[str]] = {i: [] for i in real}
    for a, b in graph.edges:
        siblings[real[a]].append(metas[real[b]][0])
        siblings[real[b]].append(metas[real[a]][0])
    identity = [int(meta["identity"]) for _, meta, _ in metas]
    for i, person in zip(real, graph.person.tolist(), strict=True):
        identity[i] = identity_of(metas[real[person]][0])
    order = sorted(range(len(metas)), key=lambda i: (identity[i], i))
    _rewrite(corpus, index, [(where[i], identity[i], siblings.get(i)) for i in order])
    return graph


def _place(meta: dict) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in meta["place"]], np.float32)


def _rewrite(corpus: Path, index: Index, clips: list[tuple[tuple[Shard, int], int, list[str] | None]]) -> None:
    """Writes the clips in a new order into a folder aside, which then takes the place of the old one."""
    old, new = corpus / FOLDER, corpus / f"{FOLDER}.paired"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    shards: list[Shard] = []
    waiting: list[Sample] = []
    held: dict[str, list[Sample]] = {}
    for n, ((shard, row), identity, siblings) in enumerate(clips):
        if shard.name not in held:
            held = dict(list(held.items())[-7:]) | {shard.name: list(read_shard(old, shard))}
        sample = held[shard.name][row]
        extra = {"identity": identity} if siblings is None else {"identity": identity, "siblings": siblings}
        waiting.append(replace(sample, meta={**sample.meta, **extra}))
        last_of_person = n + 1 == len(clips) or clips[n + 1][1] != identity
        if last_of_person and (len(waiting) >= SHARD_CLIPS or n + 1 == len(clips)):
            shards.append(write_shard(new / f"paired-{len(shards):05d}.tar", waiting))
            waiting = []
    write_index(new, replace(index, shards=tuple(shards)))
    shutil.rmtree(old)
    new.rename(old)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.data.pairs", description="Find pairs among real clips.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--face-min", type=float, default=FACE_MIN, help="cosine from which two faces are one person")
    parser.add_argument("--place-max", type=float, default=PLACE_MAX, help="similarity up to which two places are two")
    parser.add_argument("--min-seconds", type=float, default=MIN_SECONDS)
    a = parser.parse_args(arguments)
    try:
        graph = pair_corpus(a.corpus, face_min=a.face_min, place_max=a.place_max, min_seconds=a.min_seconds)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    people = len(np.unique(graph.person))
    print(f"{len(graph.person)} clips, {people} people, {len(graph.edges)} pairs of one person in two places")
    return 0


if __name__ == "__main__":
    sys.exit(main())
