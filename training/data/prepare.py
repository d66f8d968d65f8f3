"""Any folder of real videos into the shards that training reads: ``python -m training.data.prepare --videos DIR``.

Decodes at 25 fps, finds scene cuts and faces, cuts windows of one length around one face, checks lips against sound,
reads motion and encodes (training/data/stages.py says how and by which rules). ``report.csv`` has a row for every clip
and for everything that is none, with the reason. Some files make one shard; a run that was broken off goes on behind
the last whole one, and new files in the folder are taken up by the next run. ``training.data.pairs`` then finds who is
who.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from avatar_rt.config import FPS, AvatarConfig
from avatar_rt.errors import ArtifactError, AvatarError, InputError, UnsupportedError
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.sync import SyncNetwork
from avatar_rt.models.weights import load_weights
from training.data import stages
from training.data.latents import Encoder
from training.data.pairs import identity_of
from training.data.shards import (
    FOLDER,
    Index,
    Sample,
    Shard,
    read_index,
    replace_file,
    shapes_of,
    weight_hashes,
    write_index,
    write_shard,
)
from training.data.stages import Described, Embedder, Rejected, Rules
from training.recipe import configuration
from training.rewards.identity import IdentityNet, crop_faces

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v", ".ts")
REPORT = ("source", "first", "last", "outcome", "stage", "reason", "key", "offset", "confidence", "moved")
FILES_PER_SHARD = 8


@dataclass(frozen=True)
class Job:
    """The videos of one shard, named relative to ``videos``."""

    number: int
    sources: tuple[str, ...]
    videos: Path
    out: Path
    rules: Rules

    @property
    def name(self) -> str:
        return f"clips-{self.number:05d}"


class Workshop:
    """The networks that a worker holds.

    Args:
        weights: Folder with vae, speech and motion; where ``identity.safetensors`` is there too, clips get a face
            embedding by our own network.
        sync: Weights of the sync scorer; None checks no sync.
        embed: Another face embedder, as ``stages.describe`` takes it.
    """

    def __init__(self, weights: Path, sync: Path | None, embed: Embedder | None = None) -> None:
        cfg = configuration(weights)
        self.size, self.encoder = square_side(cfg), Encoder(cfg, weights)
        self.motion, self.sync = MotionEncoder(cfg.motion).eval(), None
        load_weights(self.motion, weights / "motion.safetensors", dtype=torch.float32)
        if sync is not None:
            self.sync = SyncNetwork().eval()
            load_weights(self.sync, sync, dtype=torch.float32)
        self.embed = embed
        if embed is None and (weights / "identity.safetensors").is_file():
            self.embed = own_embedder(weights / "identity.safetensors")


def square_side(cfg: AvatarConfig) -> int:
    if cfg.height != cfg.width:
        raise UnsupportedError(
            f"prepare cuts squares around faces: expected a configuration of equal height and width, got {cfg.height} "
            f"and {cfg.width}"
        )
    return cfg.height


def named_embedder(name: str) -> Embedder:
    """What the function MODULE:FUNCTION returns. Raises InputError where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError, TypeError) as e:
        raise InputError(f"embedder: expected MODULE:FUNCTION that returns a callable, got {name!r} ({e})") from None


def own_embedder(path: Path) -> Embedder:
    """training/rewards/identity.py's network as ``stages.describe`` takes an embedder."""
    net = IdentityNet().eval()
    load_weights(net, path, dtype=torch.float32)

    @torch.inference_mode()
    def embed(crop: np.ndarray, box: np.ndarray) -> np.ndarray:
        picture = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
        return np.asarray(net(crop_faces(picture, torch.from_numpy(box)[None]))[0].numpy())

    return embed


def clips_of(path: Path, shop: Workshop, rules: Rules) -> list[Described | Rejected]:
    """All stages over one video. What is wrong with the file itself is a rejection of all of it."""
    out: list[Described | Rejected] = []

    def passed(found: Iterable[Any]) -> list[Any]:
        """Those that go on; the others are done."""
        split = list(found)
        out.extend(x for x in split if isinstance(x, Rejected))
        return [x for x in split if not isinstance(x, Rejected)]

    try:
        shots = passed(stages.survey(path, rules))
        tracks = passed(stages.follow(shots, rules))
        segments = passed(s for t in tracks for s in stages.segment(t, rules))
        for group in stages.together(stages.cut(segments, shop.size, rules)):
            clips = passed(group)
            if shop.sync is not None:
                clips = passed(stages.check_sync(clips, shop.sync, rules))
            out += [stages.describe(clip, shop.motion, shop.embed) for clip in clips]
    except (InputError, cv2.error) as e:
        out.append(Rejected(0, 0, "read", str(e).splitlines()[0]))
    return sorted(out, key=lambda x: x.first if isinstance(x, Rejected) else x.clip.segment.first)


def encode(source: str, found: Described, shop: Workshop, rules: Rules) -> Sample:
    """A clip as a sample. Until training.data.pairs has looked, everybody is a person of their own."""
    clip, first = found.clip, found.clip.segment.first
    key = f"{hashlib.sha256(source.encode()).hexdigest()[:12]}-{first:06d}"
    meta = {
        "identity": identity_of(key), "scene": key, "caption": "", "source": source, "first": first,
        "sync": None if clip.offset is None else {"offset": clip.offset, "moved": clip.moved},
        "face": None if found.face is None else [round(float(v), 5) for v in found.face],
        "place": [None if np.isnan(v) else round(float(v), 2) for v in found.place],
    }  # fmt: skip
    unknown = np.full(rules.frames, np.nan, np.float32)
    return shop.encoder.sample(
        key, clip.crops, clip.sound, clip.boxes, found.motion, unknown, meta, seed=identity_of(key)
    )


def prepare_shard(job: Job, shop: Workshop) -> tuple[Shard | None, dict[str, tuple[int, ...]], list[dict[str, Any]]]:
    """Writes one shard, where any clip is left; returns its entry, its shapes, and the report's rows."""
    samples, rows = [], []
    for source in job.sources:
        for found in clips_of(job.videos / source, shop, job.rules):
            if isinstance(found, Rejected):
                rows.append({"source": source, "outcome": "rejected", **asdict(found)})
                continue
            clip, sample = found.clip, encode(source, found, shop, job.rules)
            samples.append(sample)
            first = clip.segment.first
            rows.append({"source": source, "first": first, "last": first + job.rules.frames, "outcome": "kept",
                         "key": sample.key, "offset": clip.offset, "moved": clip.moved,
                         "confidence": None if clip.confidence is None else round(clip.confidence, 4)})  # fmt: skip
    if not samples:
        return None, {}, rows
    return write_shard(job.out / FOLDER / f"{job.name}.tar", samples), shapes_of(samples[0]), rows


_shop: Workshop | None = None  # of this process


def _start(weights: Path, sync: Path | None, embedder: str | None) -> None:
    global _shop
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _shop = Workshop(weights, sync, named_embedder(embedder) if embedder else None)


def _work(job: Job) -> tuple[Job, tuple[Shard | None, dict[str, tuple[int, ...]], list[dict[str, Any]]]]:
    assert _shop is not None
    return job, prepare_shard(job, _shop)


def plan(videos: Path, out: Path, rules: Rules, files_per_shard: int = FILES_PER_SHARD) -> list[Job]:
    """What is to do: the videos that no part of the report names. Raises InputError where there is no video at all."""
    found = sorted(p.relative_to(videos).as_posix() for p in videos.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"--videos {videos}: expected videos ({', '.join(SUFFIXES)}), found none")
    parts = sorted((out / "report").glob("clips-*.csv"))
    done = {row["source"] for part in parts for row in read_rows(part)}
    number = 1 + max((int(p.stem.rpartition("-")[2]) for p in parts), default=-1)
    todo = [s for s in found if s not in done]
    groups = [tuple(todo[i : i + files_per_shard]) for i in range(0, len(todo), files_per_shard)]
    return [Job(number + k, group, videos, out, rules) for k, group in enumerate(groups)]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table_of(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, REPORT, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def prepare(videos: Path, out: Path, weights: Path, *, sync: Path | None = None, rules: Rules | None = None,
            embedder: str | None = None, workers: int = 1,
            files_per_shard: int = FILES_PER_SHARD) -> Counter[str]:  # fmt: skip
    """Prepares all videos that are new; returns how many clips of the whole report were kept, and rejected where.

    Args:
        sync: Weights of the sync scorer; None checks no sync.
        embedder: MODULE:FUNCTION that returns a face embedder (``stages.Embedder``) in each worker; None takes our own
            where its weights are there.

    Raises: InputError where there is no video or the rules cannot be; ArtifactError where weights are missing, or the
        shards that are there were made by others; UnsupportedError for a configuration that is not square.
    """
    rules = rules or Rules()
    if rules.frames % 4 != 1 or rules.frames < 5:
        raise InputError(f"frames: expected 1 + 4k, at least 5, got {rules.frames}")
    square_side(cfg := configuration(weights))
    if embedder:
        named_embedder(embedder)  # before any work is done
    for part in (weights / "motion.safetensors", *([sync] if sync is not None else [])):
        if not part.is_file():
            raise ArtifactError(f"{part}: expected weights, found none")
    index = Index(weight_hashes(weights), cfg.vae.spatial_stride)
    jobs, folder = plan(videos, out, rules, files_per_shard), out / FOLDER
    for path in (folder, out / "report"):
        path.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").exists():
        index = read_index(folder, weights)
        if index.shapes and index.shapes["motion"][0] != rules.frames:
            raise InputError(f"frames: expected {index.shapes['motion'][0]} as the clips of {folder} have, got "
                             f"{rules.frames}; choose another --out")  # fmt: skip
    # A shard without its part of the report was broken off: its videos come again.
    whole = {p.stem for p in (out / "report").glob("clips-*.csv")}
    kept = tuple(s for s in index.shards if not s.name.startswith("clips-") or Path(s.name).stem in whole)
    index = replace(index, shards=kept)
    for path in folder.glob("*.tar"):
        if path.name not in {s.name for s in kept}:
            path.unlink()
    began, total, done = time.monotonic(), sum(len(j.sources) for j in jobs), 0
    print(f"{total} new videos in {len(jobs)} shards", flush=True)
    if jobs:
        with multiprocessing.get_context("spawn").Pool(workers, _start, (weights, sync, embedder)) as pool:
            for job, (shard, shapes, rows) in pool.imap(_work, jobs):  # in order: the report's parts have no gaps
                others = tuple(s for s in index.shards if s.name != f"{job.name}.tar")
                if shard is not None:
                    index = replace(index, shapes=shapes, shards=(*others, shard))
                write_index(folder, index)
                replace_file(out / "report" / f"{job.name}.csv", table_of(rows))
                done += len(job.sources)
                left = (total - done) * (time.monotonic() - began) / done / 60
                kept = sum(r["outcome"] == "kept" for r in rows)
                print(f"{done}/{total} videos, {kept} of {len(rows)} kept here, {left:.1f} min left", flush=True)
    every = [row for part in sorted((out / "report").glob("clips-*.csv")) for row in read_rows(part)]
    replace_file(out / "report.csv", table_of(list(every)))
    return Counter(row["outcome"] if row["outcome"] == "kept" else f"rejected by {row['stage']}" for row in every)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder with vae, speech, motion .safetensors")
    parser.add_argument("--sync", type=Path, help="weights of the sync scorer; without them no sync is checked")
    parser.add_argument("--embedder", help="MODULE:FUNCTION that returns a face embedder in place of our own")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files-per-shard", type=int, default=FILES_PER_SHARD)
    for name, default in asdict(Rules()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    a = parser.parse_args(arguments)
    try:
        rules = Rules(**{name: getattr(a, name) for name in asdict(Rules())})
        counts = prepare(a.videos, a.out, a.weights, sync=a.sync, rules=rules, embedder=a.embedder,
                         workers=max(a.workers, 1), files_per_shard=max(a.files_per_shard, 1))  # fmt: skip
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for outcome, count in sorted(counts.items()):
        print(
            f"{outcome}: {count} ({count * rules.frames / FPS:.0f} s)" if outcome == "kept" else f"{outcome}: {count}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
