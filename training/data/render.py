"""Renders the corpus: ``python -m training.data.render --out DIR --identities N``.

Shards are written aside and renamed, so that a run that was broken off goes on where it stopped and readers never see
half a shard. What a shard holds depends on its number, the seed and the sizes alone, not on the number of workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avatar_rt.errors import AvatarError, InputError
from training.data.clip import Clip, make_clip
from training.data.corpus import ARRAYS
from training.data.speech import Speaker

SHARD_CLIPS = 50
TRAINING_IDENTITIES = 10_000_000  # identities from here on are kept for held-out cases


@dataclass(frozen=True)
class Job:
    """One shard: its number and the (identity, take) of each of its clips."""

    index: int
    clips: tuple[tuple[int, int], ...]
    out: Path
    frames: int
    size: int
    sampling: int

    @property
    def path(self) -> Path:
        return self.out / f"shard-{self.index:05d}"


def plan(out: Path, identities: int, takes: int, seed: int, frames: int, size: int, sampling: int) -> list[Job]:
    """All shards of a corpus. Raises InputError on sizes that cannot be."""
    if not 0 < identities < 1_000_000 or not 0 < takes < 1000:
        raise InputError(f"identities, clips per identity: expected 1..999999 and 1..999, got {identities} and {takes}")
    if seed < 0 or (seed + 1) * 1_000_000 > TRAINING_IDENTITIES:
        raise InputError(f"seed: expected 0..{TRAINING_IDENTITIES // 1_000_000 - 1}, got {seed}")
    clips = [(seed * 1_000_000 + i, take) for i in range(identities) for take in range(takes)]
    return [Job(k, tuple(clips[first : first + SHARD_CLIPS]), out, frames, size, sampling)
            for k, first in enumerate(range(0, len(clips), SHARD_CLIPS))]  # fmt: skip


def write_shard(path: Path, clips: list[Clip]) -> None:
    """Writes a shard whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in ARRAYS:
        np.save(aside / f"{name}.npy", np.stack([getattr(c, name) for c in clips]))
    (aside / "meta.jsonl").write_text("".join(json.dumps(c.meta) + "\n" for c in clips))
    if path.exists():  # an older, shorter one: the corpus has been asked to grow
        shutil.rmtree(path)
    aside.rename(path)


def is_done(job: Job) -> bool:
    """Whether the shard is there with all its clips. Raises InputError where it was rendered at another size."""
    if not (job.path / "meta.jsonl").exists():
        return False
    shape = np.load(job.path / "frames.npy", mmap_mode="r").shape
    if shape[1:] != (job.frames, job.size, job.size, 3):
        raise InputError(f"{job.path}: holds clips of shape {list(shape[1:])}, expected "
                         f"{[job.frames, job.size, job.size, 3]}; choose another --out")  # fmt: skip
    first = json.loads((job.path / "meta.jsonl").read_text().splitlines()[0])
    if first["identity"] != job.clips[0][0]:
        raise InputError(f"{job.path}: begins with identity {first['identity']}, expected {job.clips[0][0]}; "
                         "choose another --out or the same seed and clips per identity")  # fmt: skip
    return shape[0] == len(job.clips)


def render_shard(job: Job) -> int:
    """Renders and writes one shard; returns its number of clips."""
    speaker = Speaker()
    try:
        clips = [
            make_clip(speaker, i, take, frames=job.frames, size=job.size, sampling=job.sampling)
            for i, take in job.clips
        ]
    finally:
        speaker.close()
    write_shard(job.path, clips)
    return len(clips)


def run(jobs: list[Job], workers: int) -> None:
    """Renders what is missing, with a line of progress per shard."""
    todo = [job for job in jobs if not is_done(job)]
    total = sum(len(j.clips) for j in todo)
    print(f"{len(jobs)} shards, {len(todo)} to render ({total} clips)", flush=True)
    began, done = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count in pool.imap_unordered(render_shard, todo):
            done += count
            rate = done / (time.monotonic() - began)
            print(f"{done}/{total} clips, {rate:.2f} clips/s, {(total - done) / rate / 60:.1f} min left", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.render", description="Render the talking-head corpus."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--identities", type=int, required=True)
    parser.add_argument("--clips-per-identity", type=int, default=2)
    parser.add_argument("--frames", type=int, default=77)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sampling", type=int, default=3, help="supersampling per axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args(arguments)
    try:
        jobs = plan(a.out, a.identities, a.clips_per_identity, a.seed, a.frames, a.size, a.sampling)
        a.out.mkdir(parents=True, exist_ok=True)
        run(jobs, max(a.workers, 1))
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
