"""Chunk seams: whether frames differ more across a seam than from latent to latent inside a chunk.

A latent's four frames are decoded together and differ less from each other than from the next latent's; a seam lies
between two latents, so it is compared with the other such moments.

``python -m bench.quality.seams VIDEO [--bundle DIR]`` prints the figures of a video made with the bundle's chunks. It
is no column of the results: only our own chunking has known seams.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from avatar_rt.config import ChunkConfig, frames_of_latents
from avatar_rt.errors import InputError
from avatar_rt.media.reader import iter_frames
from avatar_rt.runtime.manifest import open_bundle, shipped_bundle

_PAIRS = 20_000
_SEED = 0


@dataclass(frozen=True)
class Seams:
    """Differences of neighbouring frames, in grey levels.

    Attributes:
        count: Seams in the video.
        seam, inside: Median difference across a seam, and from latent to latent within a chunk.
        within: Median difference of frames of one latent.
        excess: Share of pairs (a seam, such a moment inside) where the seam's is larger, less 1/2: 0 where seams are as
            any other, 1/2 where every seam stands out.
        low, high: Its 95 % interval by resampling.
    """

    count: int
    seam: float
    inside: float
    within: float
    excess: float
    low: float
    high: float

    @property
    def shows(self) -> bool:
        """Whether frames differ more at seams than inside."""
        return self.low > 0


def seam_frames(chunk: ChunkConfig, num_frames: int) -> np.ndarray:
    """Indices of the frames that begin a chunk, without the first."""
    return np.arange(frames_of_latents(chunk.latents), num_frames, 4 * (chunk.latents - chunk.overlap))


def differences(path: Path) -> np.ndarray:
    """Mean absolute difference of each frame to the one before, grey levels: [F - 1]."""
    out, last = [], None
    for frame in iter_frames(path):
        now = frame.astype(np.float32).mean(2)
        if last is not None:
            out.append(float(np.abs(now - last).mean()))
        last = now
    return np.array(out)


def seams(change: np.ndarray, chunk: ChunkConfig) -> Seams:
    """Figures of a video's differences [F - 1]. Raises InputError on a video with fewer than 3 seams."""
    starts = seam_frames(chunk, len(change) + 1)
    if len(starts) < 3:
        raise InputError(f"seams: expected a video of at least 4 chunks, got {len(change) + 1} frames")
    at, between = np.zeros((2, len(change)), bool)
    at[starts - 1] = True
    between[::4] = True  # the first latent holds one frame, each later one four
    rng = np.random.default_rng(_SEED)

    def share(seam: np.ndarray, inside: np.ndarray) -> float:
        a, b = rng.choice(seam, _PAIRS), rng.choice(inside, _PAIRS)
        return float((a > b).mean() + (a == b).mean() / 2 - 0.5)

    seam, inside = change[at], change[between & ~at]
    draws = [share(rng.choice(seam, len(seam)), rng.choice(inside, len(inside))) for _ in range(400)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Seams(
        len(seam),
        float(np.median(seam)),
        float(np.median(inside)),
        float(np.median(change[~between])),
        share(seam, inside),
        float(low),
        float(high),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.seams", description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--bundle", type=Path, default=shipped_bundle())
    args = parser.parse_args(argv)
    found = seams(differences(args.video), open_bundle(args.bundle).config.chunk)
    print(json.dumps({k: round(v, 4) for k, v in asdict(found).items()} | {"shows": found.shows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
