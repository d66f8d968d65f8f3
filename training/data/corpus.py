"""Reading the corpus: clips in memory-mapped shards, split by identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.errors import ArtifactError, InputError

ARRAYS = ("frames", "audio", "motion", "phonemes", "mouth", "background", "facebox")
VALIDATION_STRIDE = 20  # every 20th identity is for validation


class Corpus:
    """The clips of a rendered corpus.

    Args:
        path: folder with shard-00000, shard-00001, ...; a shard that is still being written is not seen.
        split: "train", "val" (every 20th identity) or "all".

    Attributes:
        meta: a dict per clip: identity, take, voice, sentence, caption, style, scene, attributes, seed.
        identity: int64 per clip.

    Raises: InputError on an unknown split; ArtifactError where there is no corpus or a shard is damaged.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        if split not in ("train", "val", "all"):
            raise InputError(f"split: expected train, val or all, got {split!r}")
        shards = sorted(Path(path).glob("shard-[0-9]*"))
        if not shards:
            raise ArtifactError(
                f"{path} holds no corpus (no shard-00000): run python -m training.data.render --out {path}"
            )
        self._arrays: list[dict[str, np.ndarray]] = []
        self._where: list[tuple[int, int]] = []
        self.meta: list[dict[str, Any]] = []
        for index, shard in enumerate(shards):
            arrays, metas = _open_shard(shard)
            self._arrays.append(arrays)
            for row, meta in enumerate(metas):
                held = meta["identity"] % VALIDATION_STRIDE == 0
                if split == "all" or held == (split == "val"):
                    self._where.append((index, row))
                    self.meta.append(meta)
        self.identity = np.array([m["identity"] for m in self.meta], np.int64)
        self._of: dict[int, list[int]] = {}
        for i, who in enumerate(self.identity):
            self._of.setdefault(int(who), []).append(i)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return int(self._arrays[0]["frames"].shape[1])

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return int(self._arrays[0]["frames"].shape[2])

    def _cut(self, name: str, i: int, start: int, count: int | None, unit: int = 1) -> np.ndarray:
        shard, row = self._where[i]
        whole = self._arrays[shard][name]
        total = whole.shape[1] // unit
        count = total - start if count is None else count
        if start < 0 or count < 0 or start + count > total:
            raise InputError(f"clip {i}: expected frames within 0..{total}, got start {start} and count {count}")
        return np.array(whole[row, start * unit : (start + count) * unit])

    def frames(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """uint8 [n, H, W, 3], RGB; to the end when ``n`` is None, here and below."""
        return self._cut("frames", i, start, n)

    def audio(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """int16 [n * 640], 16 kHz."""
        return self._cut("audio", i, start, n, SAMPLES_PER_FRAME)

    def motion(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """float32 [n, 62], see models/motion.py; the gaze is in radians, to the picture's right and down."""
        return self._cut("motion", i, start, n)

    def phonemes(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """int16 [n], ids of training/data/phonemes.py."""
        return self._cut("phonemes", i, start, n)

    def mouth(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """float32 [n], opening of the inner lips over the face's height."""
        return self._cut("mouth", i, start, n)

    def facebox(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """float32 [n, 4], x0 y0 x1 y1 in pixels, hairline to chin."""
        return self._cut("facebox", i, start, n)

    def background(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3], the scene without the person."""
        shard, row = self._where[i]
        return np.array(self._arrays[shard]["background"][row])

    def siblings(self, i: int) -> list[int]:
        """The other clips of the same identity."""
        return [j for j in self._of[int(self.identity[i])] if j != i]


def _open_shard(shard: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    try:
        arrays = {name: np.load(shard / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        metas = [json.loads(line) for line in (shard / "meta.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{shard}: cannot be read ({e}); delete it and render again") from None
    counts = {name: len(a) for name, a in arrays.items()} | {"meta": len(metas)}
    if len(set(counts.values())) != 1:
        raise ArtifactError(f"{shard}: expected as many clips in every file, got {counts}; delete it and render again")
    return arrays, metas
