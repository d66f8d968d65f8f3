"""Videos of cases to rows of measures: one row per (system, case), whatever the video is like.

A system is a folder of NAME.mp4, or the name of a degraded copy of the true video (``degraded.DEGRADED``). A video that
cannot be scored gets a row that says so in ``status``: no mean is ever taken without the count of those beside it.
"""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import math
import multiprocessing
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.reader import read_video
from bench.quality.cases import Source
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context, ReferenceFacts
from bench.quality.degraded import DEGRADED, degrade
from bench.quality.faces import find_faces
from bench.quality.generate import another_person
from bench.quality.measure import MODULES, Measure
from bench.quality.statistics import centre

OK = "ok"
PROBLEMS = {
    "bad_case": "the case itself cannot be read",
    "no_target": "the case has no true video to make this system of",
    "missing": "the system has no video of this name",
    "refused": "the system refused the case",
    "unreadable": "the video does not decode",
    "no_sound": "the video has no sound",
    "wrong_length": "the video is longer or shorter than the speech",
    "no_face": "a face was found in too few frames",
    "not_measured": "a measure refused the video",
}
LENGTH_SLACK = 2  # frames by which a video may be longer or shorter than the speech
MIN_PRESENT = 0.2  # of the frames must show a face, as the engine demands of a reference

Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """Whose videos are scored: a folder, or a degraded copy where ``folder`` is None."""

    name: str
    folder: Path | None = None


class Unscored(Exception):
    """A video that gets a row without figures."""

    def __init__(self, status: str, reason: str = "") -> None:
        super().__init__(status)
        self.status, self.reason = status, reason or PROBLEMS[status]


@functools.cache
def modules() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules that can measure, by name, and what the others lack."""
    found, lacking = {}, {}
    for name in MODULES:
        if importlib.util.find_spec(f"bench.quality.{name}") is None:
            lacking[name] = "it is not here"
            continue
        module = importlib.import_module(f"bench.quality.{name}")
        reason = module.available() if hasattr(module, "available") else None
        if reason is None:
            found[name] = module
        else:
            lacking[name] = str(reason)
    return found, lacking


def measures() -> tuple[Measure, ...]:
    """All columns that can be filled here, in the order of MODULES."""
    return tuple(m for module in modules()[0].values() for m in module.MEASURES)


def load(system: System, case: Case, another: Case | None) -> Clip:
    """A system's video of a case. Raises Unscored with the problem's name."""
    if system.folder is None:
        if case.target is None:
            raise Unscored("no_target")
        try:
            return degrade(system.name, case, another)
        except InputError as e:
            raise Unscored("missing", str(e)) from None
    path = system.folder / f"{case.name}.mp4"
    if not path.is_file():
        told = path.with_suffix(".refused.txt")
        if told.is_file():
            raise Unscored("refused", told.read_text().strip())
        raise Unscored("missing")
    try:
        video = read_video(path)
    except AvatarError as e:
        raise Unscored("unreadable", str(e)) from None
    return Clip(video.frames, video.audio)


def check(case: Case, video: Clip) -> tuple[Clip, Faces]:
    """The video cut to the speech, and its faces. Raises Unscored where it cannot be held against the case."""
    if video.sound is None:
        raise Unscored("no_sound")
    expected = math.ceil(len(case.speech) / SAMPLES_PER_FRAME)
    if abs(len(video.frames) - expected) > LENGTH_SLACK:
        raise Unscored("wrong_length", f"expected {expected} frames, got {len(video.frames)}")
    cut = Clip(video.frames[:expected], video.sound[: expected * SAMPLES_PER_FRAME])
    faces = find_faces(cut.frames)
    if faces.found.mean() < MIN_PRESENT:
        raise Unscored("no_face", f"a face was found in {int(faces.found.sum())} of {len(faces.found)} frames")
    return cut, faces


def score_video(system: System, case: Case, another: Case | None, context: Context) -> Row:
    """One row."""
    row: Row = {"system": system.name, "case": case.name, "status": OK, "reason": ""}
    row |= {m.key: math.nan for m in measures()}
    try:
        video, faces = check(case, load(system, case, another))
        context.series.clear()
        for name, module in modules()[0].items():
            try:
                row |= module.measure(case, video, faces, context)
            except AvatarError as e:
                raise Unscored("not_measured", f"{name}: {e}") from None
    except Unscored as e:
        row |= {"status": e.status, "reason": e.reason} | {m.key: math.nan for m in measures()}
    return row


def score(
    sources: list[Source], systems: list[System], context: Context, *, workers: int = 1, quiet: bool = True
) -> list[Row]:
    """Rows of all systems over all cases, ordered by system, then case.

    Args:
        sources: The cases; retrieval chooses among their references.
        systems: Whose videos.
        context: Bundle and embedder; with more than one worker each process makes its own of it.
        workers: Processes.
        quiet: No line of progress per case.
    """
    several = any(s.name == "other" and s.folder is None for s in systems)
    found: dict[str, ReferenceFacts] = {}
    rows: list[Row] = []
    with _Pool(workers, context) as pool:
        for facts in pool.map(_prepare, [(s,) for s in sources]):
            found |= {} if facts is None else {facts.name: facts}
        tasks = [(i, sources if several else sources[i : i + 1], systems, found) for i in range(len(sources))]
        for i, some in enumerate(pool.map(_score_case, tasks)):
            rows += some
            if not quiet:
                bad = [r["status"] for r in some if r["status"] != OK]
                print(f"{i + 1}/{len(sources)} {sources[i].name} {' '.join(bad)}", file=sys.stderr, flush=True)
    order = {system.name: k for k, system in enumerate(systems)}
    return sorted(rows, key=lambda r: order[r["system"]])


def means(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Per system: ``cases``, ``scored``, a count per problem, and the ``mean`` of each measure over the scored rows.

    The mean is ``statistics.centre``: 10 % trimmed at each end, plain for shares. A value that a measure could not give
    is left out of that measure's mean and counted in ``unmeasured``.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(r["system"] for r in rows):
        own = [r for r in rows if r["system"] == name]
        good = [r for r in own if r["status"] == OK]
        problems = [r["status"] for r in own if r["status"] != OK]
        entry: dict[str, Any] = {"cases": len(own), "scored": len(good)}
        entry["problems"] = {p: problems.count(p) for p in PROBLEMS if p in problems}
        entry["mean"], entry["unmeasured"] = {}, {}
        for m in measures():
            values = np.array([r[m.key] for r in good], np.float64)
            there = values[~np.isnan(values)]
            entry["mean"][m.key] = centre(there) if len(there) else None
            if len(there) < len(values):
                entry["unmeasured"][m.key] = len(values) - len(there)
        out[name] = entry
    return out


def write_csv(path: Path, rows: list[Row]) -> None:
    """The rows as they are; a value that could not be measured is ``nan``."""
    with open(path, "w", newline="") as file:
        keys = ["system", "case", "status", "reason", *(m.key for m in measures())]
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _prepare(source: Source, context: Context) -> ReferenceFacts | None:
    """Facts of a case's reference; None for a case that cannot be read, which gets its row later."""
    try:
        case = source.read()
        for name, module in modules()[0].items():
            if hasattr(module, "prepare"):
                context.facts(case, name)
        return context.reference(case)
    except AvatarError:
        return None


def _score_case(
    index: int, sources: list[Source], systems: list[System], found: dict[str, ReferenceFacts], context: Context
) -> list[Row]:
    index = index if len(sources) > 1 else 0
    source = sources[index]
    try:
        case = source.read()
    except AvatarError as e:
        empty = {"status": "bad_case", "reason": str(e)} | {m.key: math.nan for m in measures()}
        return [{"system": s.name, "case": source.name} | empty for s in systems]
    context.references = found
    another = another_person(sources, index, case.identity) if len(sources) > 1 else None
    return [score_video(system, case, another, context) for system in systems]


class _Pool:
    """Runs tasks with a context: here for one worker, else in processes that keep theirs from task to task."""

    def __init__(self, workers: int, context: Context) -> None:
        self.workers, self.context = workers, context

    def __enter__(self) -> _Pool:
        self.pool = None
        if self.workers > 1:
            fresh = replace(self.context, references={}, series={})
            self.pool = multiprocessing.get_context("spawn").Pool(self.workers, _start, (fresh,))
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()

    def map(self, work: Any, tasks: list[tuple]) -> Iterable[Any]:
        """Results in the order of the tasks, as they come."""
        if self.pool is None:
            return (work(*task, self.context) for task in tasks)
        return self.pool.imap(_call, [(work, task) for task in tasks])


_context: Context  # of a worker process


def _start(context: Context) -> None:
    global _context
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _context = context


def _call(job: tuple[Any, tuple]) -> Any:
    work, task = job
    return work(*task, _context)


__all__ = ["DEGRADED", "OK", "PROBLEMS", "Row", "System", "check", "load", "means", "measures", "modules",
           "score", "score_video", "write_csv"]  # fmt: skip
