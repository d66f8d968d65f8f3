"""Training data on disk: webdataset tar shards of encoded clips beside an ``index.json``.

A clip is one sample: ``<key>.latents.npy``, ``<key>.speech.npy``, ... and ``<key>.meta.json``, so that webdataset (or
tar) reads a shard without this project. The index says which weights made the arrays, how they are shaped and whose
clips each shard holds. A shard is written aside and renamed, then entered into the index: what the index does not name
is not there. All clips of an identity lie in one shard, so that a reader finds a person's other
scene beside it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from avatar_rt.errors import ArtifactError
from avatar_rt.runtime.manifest import file_hash

FORMAT = 1
FOLDER = "latents"  # of a corpus
PARTS = ("vae", "speech")  # whose weights decide what the arrays mean
ARRAYS = ("latents", "scenes", "scene_masks", "speech", "motion", "mouth", "facebox")


@dataclass(frozen=True)
class Sample:
    """One encoded clip of F video frames, T = 1 + (F - 1) / 4 latent frames.

    Attributes:
        key: unique in a corpus; no dot in it.
        latents: fp16 [T, C, h, w], normalised by the VAE's statistics.
        scenes, scene_masks: fp16 [n, C, h, w] and bool [n, h, w], True where the scene image was kept.
        speech: fp16 [F, A] features of the sound at -16 LUFS.
        motion: fp32 [F, 62] in natural units (models/motion.py).
        mouth: fp32 [F] lip opening over the face's height; NaN where nobody measured it.
        facebox: fp32 [F, 4] x0 y0 x1 y1 in pixels, hairline to chin.
        meta: ``identity`` (int, who), ``scene`` (where), ``caption``, ``source``, and whatever else is known. Clips of
            one identity in two scenes are siblings; where ``siblings`` names keys, only those are.
    """

    key: str
    latents: np.ndarray
    scenes: np.ndarray
    scene_masks: np.ndarray
    speech: np.ndarray
    motion: np.ndarray
    mouth: np.ndarray
    facebox: np.ndarray
    meta: dict[str, Any]

    @property
    def identity(self) -> int:
        return int(self.meta["identity"])

    def is_sibling(self, other: Sample) -> bool:
        """Whether ``other`` shows the same person in another scene: what a reference is."""
        named = self.meta.get("siblings")
        apart = self.identity == other.identity and self.meta.get("scene") != other.meta.get("scene")
        return apart and (named is None or other.key in named)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ARRAYS}


@dataclass(frozen=True)
class Shard:
    """One tar file: its name and size, and for each clip in order its identity and whether it has a sibling."""

    name: str
    bytes: int
    identities: tuple[int, ...]
    paired: tuple[bool, ...]


@dataclass(frozen=True)
class Index:
    """What ``index.json`` holds.

    Attributes:
        weights: SHA-256 of each part of PARTS.
        stride: pixels per latent, height and width.
        shapes: shape of each array of ARRAYS, the same for every clip; empty until the first shard is there.
        shards: the shards, in order.
    """

    weights: dict[str, str]
    stride: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    @property
    def clips(self) -> int:
        return sum(len(s.identities) for s in self.shards)


def weight_hashes(weights: Path) -> dict[str, str]:
    """SHA-256 of the parts in a folder of weights. Raises ArtifactError where one is missing."""
    missing = [p for p in PARTS if not (weights / f"{p}.safetensors").is_file()]
    if missing:
        raise ArtifactError(f"{weights}: expected {', '.join(f'{p}.safetensors' for p in missing)}, found none")
    return {p: file_hash(weights / f"{p}.safetensors") for p in PARTS}


def read_index(folder: Path, weights: Path | None = None) -> Index:
    """The index of a folder of shards.

    Args:
        weights: Folder of weights that the arrays must have been made by; None takes any.

    Raises: ArtifactError where there is no index, it is damaged or of another format, or its arrays were made by other
        weights.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no encoded clips (no index.json): run python -m training.data.latents")
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ArtifactError(f"{path}: expected format {FORMAT}, got {raw['format']!r}: encode the corpus again")
        shards = tuple(
            Shard(s["name"], s["bytes"], tuple(s["identities"]), tuple(map(bool, s["paired"]))) for s in raw["shards"]
        )
        index = Index(raw["weights"], raw["stride"], {k: tuple(v) for k, v in raw["shapes"].items()}, shards)
    except (ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{path}: cannot be read ({e!r}): encode the corpus again") from None
    if weights is not None:
        check_weights(folder, index, weight_hashes(weights))
    return index


def check_weights(folder: Path, index: Index, hashes: dict[str, str]) -> None:
    """Raises ArtifactError where the arrays of ``folder`` were made by other weights than ``hashes`` names."""
    other = [p for p in PARTS if index.weights.get(p) != hashes[p]]
    if other:
        told = ", ".join(f"{p} {str(index.weights.get(p))[:12]} instead of {hashes[p][:12]}" for p in other)
        raise ArtifactError(f"{folder}: its clips were encoded by other weights ({told}): encode the corpus again")


def write_index(folder: Path, index: Index) -> None:
    raw = {
        "format": FORMAT, "weights": index.weights, "stride": index.stride, "shapes": index.shapes,
        "shards": [{**vars(s), "paired": [int(p) for p in s.paired]} for s in index.shards],
    }  # fmt: skip
    replace_file(folder / "index.json", (json.dumps(raw) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Writes a shard whole or not at all; the same samples give the same bytes."""
    aside, samples = path.with_name(f".{path.name}.{os.getpid()}"), list(samples)
    try:
        with aside.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as tar:
            for sample in samples:
                arrays = {f"{name}.npy": _pack(a) for name, a in sample.arrays().items()}
                tar.write({"__key__": sample.key, "meta.json": json.dumps(sample.meta).encode(), **arrays})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    identities = tuple(s.identity for s in samples)
    return Shard(path.name, path.stat().st_size, identities, tuple(map(bool, siblings(samples))))


def siblings(samples: list[Sample]) -> list[list[int]]:
    """Per clip, the positions of its siblings among ``samples``."""
    of: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        of.setdefault(sample.identity, []).append(i)
    return [[j for j in of[s.identity] if s.is_sibling(samples[j])] for s in samples]


def read_shard(folder: Path, shard: Shard) -> Iterator[Sample]:
    """The clips of a shard, in order. Raises ArtifactError where it is missing or not what the index says."""
    path, count = folder / shard.name, 0
    found = path.stat().st_size if path.is_file() else 0
    if found != shard.bytes:
        told = f"{found} bytes" if found else "none"
        raise ArtifactError(
            f"{path}: expected {shard.bytes} bytes as in the index, got {told}: encode the corpus again"
        )
    try:
        with path.open("rb") as file:
            files = ({**f, "__url__": str(path)} for f in webdataset.tariterators.tar_file_iterator(file))
            for raw in webdataset.tariterators.group_by_keys(files):
                arrays = {name: np.load(io.BytesIO(raw[f"{name}.npy"]), allow_pickle=False) for name in ARRAYS}
                yield Sample(raw["__key__"], meta=json.loads(raw["meta.json"]), **arrays)
                count += 1
    except (OSError, ValueError, KeyError) as e:
        raise ArtifactError(f"{path}: damaged after {count} clips ({e!r}): encode the corpus again") from None
    if count != len(shard.identities):
        raise ArtifactError(f"{path}: expected {len(shard.identities)} clips as in the index, got {count}")


def shapes_of(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in sample.arrays().items()}


def _pack(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
