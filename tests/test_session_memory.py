"""What a long stream holds: counted in the session, and seen in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from avatar_rt.config import SAMPLE_RATE

LONG = """
import json
import numpy as np
from test_session import SAMPLE_RATE, SAMPLES, AvatarEngine, Path, open_, push_pieces

engine = AvatarEngine()
session = open_(engine, engine.prepare(SAMPLES / "reference.mp4"), queue_seconds=2.0)
push_pieces(session, np.random.default_rng(0).standard_normal(12 * SAMPLE_RATE).astype(np.float32) * 0.1)
kept, memory = [], []
for _ in session.frames(wait=True):
    kept.append(sum(p.shape[1] for p in session._stream._sound._pieces))
    memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
print(json.dumps([kept, memory]))
"""


def test_a_long_stream_holds_a_short_piece_of_its_sound() -> None:
    """Three times as long, no more memory: what the session keeps is counted, and what a process of its own has, which
    gives back at once what it frees."""
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    told = subprocess.run(
        [sys.executable, "-c", LONG], cwd=Path(__file__).parent, env=own, stdout=subprocess.PIPE, check=True
    )
    kept, memory = json.loads(told.stdout)
    assert len(kept) == 13
    assert max(kept) <= 2.0 * SAMPLE_RATE + 40_000  # the queue, and what the next chunk hears before its own frames
    assert np.median(memory[6:]) < np.median(memory[2:6]) + 5e6
