"""The arithmetic of LSE-C and LSE-D (SyncNet v2's evaluation), over any two sequences of window embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_OFFSET = 15  # frames to each side: 31 offsets
WINDOW = 5  # frames a window spans


@dataclass(frozen=True)
class Sync:
    """What the distances say.

    Attributes:
        lse_c: Median over the offsets minus the minimum: how much the best offset stands out; higher is better.
        lse_d: The minimum: how near the windows come at the best offset; lower is better.
        late: Frames by which the sound is late against the picture (early below 0): argmin - 15. SyncNet's own
            program prints 15 - argmin, the same with the other sign.
    """

    lse_c: float
    lse_d: float
    late: int


def usable_windows(num_frames: int, num_samples: int) -> int:
    """Windows that the protocol looks at: min(frames, samples // 640) - 5, or 0."""
    return max(min(num_frames, num_samples // 640) - WINDOW, 0)


def distances(video: np.ndarray, sound: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """Distance of every video window to the sound windows around it.

    Args:
        video, sound: fp32 [n, E], the windows that start at frame 0 .. n - 1.
        eps: Added to every difference; SyncNet's program gets 1e-6 from torch's pairwise_distance.

    Returns: float64 [n, 31]; column j compares window i with sound window i + j - 15, a zero vector outside of 0..n-1.
    """
    n = len(video)
    padded = np.zeros((n + 2 * MAX_OFFSET, sound.shape[1]), np.float64)
    padded[MAX_OFFSET : MAX_OFFSET + n] = sound[:n]
    columns = [video - padded[j : j + n] + eps for j in range(2 * MAX_OFFSET + 1)]
    return np.stack([np.sqrt((c**2).sum(1)) for c in columns], axis=1)


def decide(table: np.ndarray) -> Sync:
    """Distances [n, 31] -> their mean over time, and what it says."""
    mean = table.mean(0)
    best = int(mean.argmin())
    return Sync(float(np.median(mean) - mean[best]), float(mean[best]), best - MAX_OFFSET)
