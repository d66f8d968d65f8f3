"""A folder with a rater's page, and the key that says which video is whose, outside of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt.config import FPS
from avatar_rt.errors import InputError
from avatar_rt.media.reader import read_video
from bench.quality import pages, videos
from bench.quality.study.questions import KEY, KINDS, PAGE, PAIRWISE, PLAYED_CASES, REAL, asked

TEMPLATES = Path(__file__).parent / "templates"
REPEATS = 0.05  # of the trials come twice, to see whether a rater agrees with themselves


@dataclass(frozen=True)
class Study:
    """What a study is of.

    Attributes:
        systems: {name: {case: video}}, with the hidden reference among them.
        references: {case: clip of the person that the rater may look at}; empty for ``real_or_generated``.
        hidden: The system that is the truth.
        cases: Those that every system has.
        left_out: {case: why it is not asked}.
    """

    kind: str
    seed: int
    systems: dict[str, dict[str, Path]]
    references: dict[str, Path]
    hidden: str
    cases: tuple[str, ...]
    left_out: dict[str, str]


def plan(systems: Mapping[str, Path], cases: Path, kind: str, seed: int, hidden: str = "truth") -> Study:
    """Which cases can be asked. The hidden reference is a system of that name, else the cases' ``target.mp4``.

    Raises: InputError on another kind, fewer than two systems, or no case that all of them have.
    """
    if kind not in KINDS:
        raise InputError(f"--kind: expected one of {', '.join(KINDS)}, got {kind}")
    if not cases.is_dir():
        raise InputError(f"--cases: there is no folder {cases}")
    found = {name: videos.find_videos(folder) for name, folder in systems.items()}
    if hidden not in found:
        found[hidden] = videos.case_videos(cases, "target")
    if len(found) < 2:
        raise InputError(f"--videos: expected at least one system beside the hidden reference, got {', '.join(found)}")
    references = {} if kind == REAL else videos.case_videos(cases, "reference")
    left_out = {}
    for case in sorted(set().union(*found.values())):
        absent = [name for name, of in found.items() if case not in of]
        absent += [] if kind == REAL or case in references else ["the reference clip"]
        if absent:
            left_out[case] = f"no video of {', '.join(absent)}"
    kept = tuple(c for c in sorted(set().union(*found.values())) if c not in left_out)
    if not kept:
        told = "; ".join(f"{case}: {why}" for case, why in itertools.islice(left_out.items(), 3)) or "no video at all"
        raise InputError(f"--videos: expected a case that every system has, got none ({told})")
    return Study(kind, seed, found, references, hidden, kept, left_out)


def blind(seed: int, *names: str) -> str:
    """A name that tells nothing: 16 hex digits."""
    return hashlib.sha256(json.dumps(["avatar_rt.study", seed, *names]).encode()).hexdigest()[:16]


def write_study(
    study: Study, out: Path, *, title: str = "Video study", post: str | None = None, per_rater: int | None = None
) -> dict[str, Any]:
    """Writes ``out/page`` (index.html, videos) and ``out/key.json``; gives the key.

    Every video is written anew by the same encoder and cut to the shortest of its case, so that neither the file nor
    the length tells whose it is. An earlier study in ``out`` is replaced.

    Args:
        post: Where the page also sends the answers.
        per_rater: How many trials a rater gets at least, in whole cases; None is all.

    Raises: InputError on a video that cannot be read, or an ``out`` with other files.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "key.json").is_file():
        raise InputError(f"{out}: expected an empty folder or an earlier study, got a folder with other files")
    shutil.rmtree(out / "page", ignore_errors=True)
    folder = out / "page" / "videos"
    folder.mkdir(parents=True)
    items: dict[str, dict[str, Any]] = {}
    for case in study.cases:
        items |= _write_case(study, case, folder)
    trials = [trial for case in study.cases for trial in _trials(study, case)]
    trials.sort(key=lambda t: t["id"])  # the order of cases and systems is gone; each rater's own comes from their name
    name = blind(study.seed, study.kind, title, str(per_rater), *sorted(items))
    questions = asked(study.kind)
    data = {
        "schema": PAGE, "study": name, "kind": study.kind, "title": title, "trials": trials, "questions": questions,
        "repeats": REPEATS, "per_rater": per_rater, "post": post,
    }  # fmt: skip
    page = pages.render("study.html", TEMPLATES, data=data, title=title, about=PLAYED_CASES[study.kind])
    (out / "page" / "index.html").write_text(page, encoding="utf-8")
    key = {
        "schema": KEY, "study": name, "kind": study.kind, "hidden": study.hidden, "seed": study.seed, "title": title,
        "items": items, "trials": {t["id"]: t["videos"] for t in trials}, "left_out": study.left_out,
    }  # fmt: skip
    (out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    return key


def _write_case(study: Study, case: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The case's videos under blind names; {name: whose, which, its seconds and how many frames were cut}."""
    clips = {system: read_video(of[case]) for system, of in study.systems.items()}
    length = min(len(clip.frames) for clip in clips.values())
    items = {}
    for system, clip in clips.items():
        name = blind(study.seed, system, case)
        sound = None if clip.audio is None else np.ascontiguousarray(clip.audio[: length * 16_000 // FPS])
        videos.write(folder / f"{name}.mp4", clip.frames[:length], sound)
        cut = len(clip.frames) - length
        items[name] = {"system": system, "case": case, "seconds": length / FPS, "frames_cut": cut}
    if case in study.references:
        clip = read_video(study.references[case])
        videos.write(folder / f"{blind(study.seed, '', case)}.mp4", clip.frames, clip.audio)
    return items


def _trials(study: Study, case: str) -> list[dict[str, Any]]:
    names = [blind(study.seed, system, case) for system in study.systems]
    shown = itertools.combinations(sorted(names), 2) if study.kind == PAIRWISE else ((name,) for name in names)
    group = blind(study.seed, "", case)
    reference = None if study.kind == REAL else group
    return [{"id": "-".join(of), "videos": list(of), "group": group, "reference": reference} for of in shown]
