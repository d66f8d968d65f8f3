"""The curriculum and its ablations, run and measured: ``python -m bench.curriculum --corpus DIR --out DIR --write``.

Every leg is one run of ``python -m training.train`` (in a process of its own, resumed where it was cut off), then the
procedural cases generated with its weights, then ``bench.quality`` over them. What is done is kept in ``OUT/LEG`` and
not done again, so the command may be stopped at any moment and given again; ``--legs`` takes some of them,
``--measure`` trains nothing. The legs ``tiny`` and ``tiny.*`` are the shipped weights, which are not trained here.
Where the sampler's likeness would hide what a training has taught, the legs of stage 3 are measured without it. The
last line printed is one JSON document; with ``--write`` it becomes ``bench/results/curriculum.json`` and
``docs/curriculum.md``. Give a folder of its own to other step counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from avatar_rt.config import AvatarConfig
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.reader import read_video
from avatar_rt.models.motion import motion_index
from avatar_rt.runtime.manifest import open_bundle, shipped_bundle, write_manifest
from bench.curriculum_page import PAGE, page
from bench.quality.cases import CASES, REFERENCE_SECONDS, Source, procedural
from bench.quality.context import Context
from bench.quality.faces import find_faces
from bench.quality.generate import write
from bench.quality.motion import correlation, read_motion, readable
from bench.quality.partial import Sees, caption, generate
from bench.quality.score import OK, Row, System, means, score, write_csv
from bench.report import RESULTS, ROOT, machine

STEPS = {"t2v": 900, "a2v": 1800, "personality": 1200}


@dataclass(frozen=True)
class Leg:
    """One run: a recipe, the leg whose weights it begins with, the stage it belongs to, what its model sees.

    ``shipped``: no run, but the weights of the package, which stage 3 trained with all conditions at once. ``of``: no
    run, but the weights of that other leg. ``alone``: measured without the sampler's likeness.
    """

    recipe: str
    stage: str
    after: str | None
    sees: Sees
    shipped: bool = False
    alone: bool = False
    of: str | None = None

    @property
    def name(self) -> str:
        """The recipe, without saying the stage twice."""
        return self.stage if self.recipe == f"{self.stage}.{self.stage}" else self.recipe


_TEXT = Sees(audio=False, reference=False, anchor="none", caption=True)
_SPEECH = Sees(reference=False, anchor="picture")
LEGS = (
    Leg("t2v.t2v", "t2v", None, _TEXT),
    Leg("t2v.scratch", "t2v", None, _TEXT),
    Leg("a2v.a2v", "a2v", "t2v", _SPEECH),
    Leg("a2v.scratch", "a2v", None, _SPEECH),
    Leg("a2v.no_audio", "a2v", "t2v", dataclasses.replace(_SPEECH, audio=False)),
    Leg("personality.personality", "personality", "a2v", Sees()),
    Leg("personality.alone", "personality", None, Sees(), alone=True, of="personality"),
    Leg("personality.no_reference", "personality", "a2v", Sees(reference=False)),
    Leg("personality.no_motion", "personality", "a2v", Sees(), alone=True),
    Leg("personality.no_auxiliary", "personality", "a2v", Sees(), alone=True),
    Leg("personality.same_scene", "personality", "a2v", Sees(), alone=True),
    Leg("tiny", "personality", None, Sees(), shipped=True),
    Leg("tiny.no_reference", "personality", None, Sees(reference=False), shipped=True),
    Leg("tiny.alone", "personality", None, Sees(), shipped=True, alone=True),
)
SWEPT = ("personality", "tiny")
"""Legs that are also measured with references of 1, 2, 4 and 8 seconds."""

PARTS = ("vae", "speech", "motion")  # of the corpus; the transformer and its text come from the leg


def train(command: list[str]) -> None:
    """Runs one training command to its end. Raises InputError where it fails."""
    done = subprocess.run([sys.executable, "-m", "training.train", *command], cwd=ROOT, check=False)
    if done.returncode:
        raise InputError(
            f"training.train {' '.join(command)}: expected it to end well, got exit code {done.returncode}"
        )


def steps_of(leg: Leg, asked: dict[str, int], out: Path) -> int:
    """Steps of a leg: what was asked for it or its stage; ``a2v.scratch`` gets the tokens of stages 1 and 2."""
    if leg.name in asked:
        return asked[leg.name]
    if leg.name != "a2v.scratch":
        return asked[leg.stage]
    before = [json.loads((out / name / "leg.json").read_text()) for name in ("t2v", "a2v")
              if (out / name / "leg.json").is_file()]  # fmt: skip
    if len(before) < 2:
        raise InputError("a2v.scratch: expected t2v and a2v to be trained before it, for it gets the tokens of both")
    return round(before[1]["steps"] * sum(b["tokens"] for b in before) / max(before[1]["tokens"], 1))


def run_leg(leg: Leg, corpus: Path, out: Path, steps: int, run: Callable[[list[str]], None]) -> dict[str, Any]:
    """Trains a leg where that is not done yet. Returns its record: steps, tokens, CPU minutes, the last validation."""
    folder, note = out / leg.name, out / leg.name / "leg.json"
    if note.is_file() and (known := json.loads(note.read_text()))["steps"] == steps:
        return dict(known)
    command = ["--recipe", leg.recipe, "--corpus", str(corpus), "--out", str(folder), "--resume",
               "--set", f"steps={steps}"]  # fmt: skip
    if leg.after is not None:
        if not (out / leg.after / "dit.safetensors").is_file():
            raise InputError(
                f"{leg.name}: expected {leg.after} to be trained before it, {out / leg.after} has no weights"
            )
        command += ["--init", str(out / leg.after)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record = {"steps": steps, "cpu_minutes": round(spent / 60, 2), **read_metrics(folder / "metrics.jsonl")}
    note.write_text(json.dumps(record) + "\n")
    return record


def read_metrics(path: Path) -> dict[str, Any]:
    """``tokens`` in all and the last ``validation`` of a run's metrics."""
    tokens, last, validation, known = 0.0, 0, {}, {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "val" in entry:
            validation = entry["val"]
        elif entry["step"] not in known:  # a resumed run may tell a step twice
            known[entry["step"]] = entry.get("tokens", 0.0)
    for step in sorted(known):
        tokens, last = tokens + known[step] * (step - last), step
    return {"tokens": round(tokens), "validation": validation}


def note_shipped(folder: Path) -> None:
    """Notes whose videos a folder will hold. Raises InputError where it holds those of other weights or settings."""
    shipped, note = open_bundle(shipped_bundle()), folder / "leg.json"
    now = {"weights": shipped.weights_hash, "sampling": json.loads(shipped.config.to_json())["sampling"]}
    if note.is_file() and json.loads(note.read_text()) != now:
        raise InputError(f"{folder}: holds videos of other shipped weights or settings; take another --out")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now) + "\n")


def note_weights(folder: Path, other: Path) -> None:
    """Notes whose weights a folder's videos are of. Raises InputError where those were not trained."""
    if not (other / "leg.json").is_file():
        raise InputError(f"{folder.name}: expected {other.name} to be trained before it, {other} has no leg.json")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leg.json").write_text(json.dumps({"of": other.name}) + "\n")


def make_bundle(leg: Leg, folder: Path, corpus: Path) -> Path:
    """A leg's weights and the corpus' encoders as a bundle."""
    bundle, own = folder / "bundle", shipped_bundle() if leg.shipped else folder.with_name(leg.of or folder.name)
    bundle.mkdir(parents=True, exist_ok=True)
    config = AvatarConfig.from_json((own / "config.json").read_text())
    if leg.alone:
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, likeness=()))
    (bundle / "config.json").write_text(config.to_json())
    for source, names in ((own if leg.shipped else corpus / "weights", PARTS), (own, ("dit", "text"))):
        for name in names:
            if (source / f"{name}.safetensors").is_file():
                shutil.copy(source / f"{name}.safetensors", bundle)
    write_manifest(bundle)
    return bundle


def make_videos(leg: Leg, bundle: Path, videos: Path, sources: list[Source], steps: int | None) -> None:
    """NAME.mp4 of each case that is not there yet, and NAME.npy with the motion the model generated, if it does."""
    videos.mkdir(parents=True, exist_ok=True)
    todo = [(i, s) for i, s in enumerate(sources) if not (videos / f"{s.name}.mp4").is_file()]
    engine = AvatarEngine(bundle) if todo else None
    for i, source in todo:
        assert engine is not None
        prompt = caption(source.path) if leg.sees.caption else ""
        made = generate(engine, source.read(), leg.sees, prompt=prompt, seed=i, steps=steps)
        if made.motion is not None:
            np.save(videos / f"{source.name}.npy", made.motion)
        write(videos / f"{source.name}.mp4", made.clip)
        print(f"{videos}: {source.name}", file=sys.stderr, flush=True)


def loop_closed(videos: Path, sources: list[Source], context: Context) -> float | None:
    """How well the generated motion agrees with what is seen: mean r of the jaw over the cases, or None."""
    found = []
    for source in sources:
        if not (videos / f"{source.name}.npy").is_file():
            continue
        told, frames = np.load(videos / f"{source.name}.npy"), read_video(videos / f"{source.name}.mp4").frames
        faces = find_faces(frames)
        if not readable(faces):
            continue
        seen = read_motion(frames, faces, context.motion)
        found.append(correlation(told[:, motion_index("jawOpen")], seen[:, motion_index("jawOpen")]))
    known = [r for r in found if not math.isnan(r)]
    return float(np.mean(known)) if known else None


def measure(videos: Path, bundle: Path, sources: list[Source], workers: int) -> dict[str, Any]:
    """Scores of a folder of videos, kept in scores.csv: means, offsets found, the closed loop."""
    kept = videos / "measured.json"
    names = [s.name for s in sources]
    if kept.is_file() and (known := json.loads(kept.read_text()))["cases"] == names:
        return dict(known)
    context = Context(bundle)
    rows = score(sources, [System("leg", videos)], context, workers=workers, quiet=False)
    write_csv(videos / "scores.csv", rows)
    result = {**means(rows)["leg"], **offsets(rows), "loop_r": loop_closed(videos, sources, context)}
    result |= {"cases": names, "commit": machine()["commit"]}
    kept.write_text(json.dumps(result) + "\n")
    return result


def offsets(rows: list[Row], within: int = 2) -> dict[str, float]:
    """Of all cases, scored or not: the share whose sound was found within so many frames."""
    good = [r for r in rows if r["status"] == OK and abs(r.get("offset_star", math.nan)) <= within]
    return {"offset_within_2": len(good) / max(len(rows), 1)}


def chosen(text: str | None) -> list[Leg]:
    """Legs by name, in the order in which they depend on each other."""
    names = text.split(",") if text else [leg.name for leg in LEGS]
    if unknown := sorted(set(names) - {leg.name for leg in LEGS}):
        raise InputError(f"legs: expected some of {', '.join(leg.name for leg in LEGS)}, got {', '.join(unknown)}")
    return [leg for leg in LEGS if leg.name in names]


def run_all(a: argparse.Namespace, run: Callable[[list[str]], None] = train) -> dict[str, Any]:
    """Everything that is asked for and not there yet; the whole curriculum's results, of all legs in ``OUT``."""
    asked = {**STEPS, **{k: int(v) for k, _, v in (part.partition("=") for part in a.steps)}}
    if unknown := sorted(set(asked) - set(STEPS) - {leg.name for leg in LEGS}):
        raise InputError(f"steps: expected STAGE=N or LEG=N, got {', '.join(unknown)}")
    found: dict[str, Any] = {}
    for leg in chosen(a.legs):
        folder = a.out / leg.name
        if leg.shipped:
            note_shipped(folder)
        elif leg.of is not None:
            note_weights(folder, a.out / leg.of)
        elif not a.measure:
            run_leg(leg, a.corpus, a.out, steps_of(leg, asked, a.out), run)
        elif not (folder / "leg.json").is_file():
            raise InputError(f"{leg.name}: expected it to be trained, {folder} has no leg.json")
        sources = [Source(p) for p in procedural(a.cases)][: a.count]
        entry = {**json.loads((folder / "leg.json").read_text()), "stage": leg.stage}
        if a.count != 0:
            bundle = make_bundle(leg, folder, a.corpus)
            make_videos(leg, bundle, folder / "videos", sources, a.solver_steps)
            entry["quality"] = measure(folder / "videos", bundle, sources, a.workers)
            if leg.name in SWEPT:
                entry["seconds"] = sweep(leg, folder, bundle, sources, entry["quality"], a)
        (folder / "result.json").write_text(json.dumps(entry) + "\n")
    for leg in LEGS:
        if (path := a.out / leg.name / "result.json").is_file():
            found[leg.name] = json.loads(path.read_text())
    return found


def sweep(
    leg: Leg, folder: Path, bundle: Path, sources: list[Source], quality: dict[str, Any], a: argparse.Namespace
) -> dict[str, Any]:
    """The same leg with references of 1 to 8 seconds; ``quality`` is of 8, for the cases' are that long.

    Every length is held against all of the reference: against its own few frames, a shorter one would be the easier to
    resemble.
    """
    *shorter, longest = REFERENCE_SECONDS
    out = {}
    for seconds in shorter:
        videos = folder / f"videos-{seconds}s"
        make_videos(leg, bundle, videos, [dataclasses.replace(s, seconds=seconds) for s in sources], a.solver_steps)
        out[str(seconds)] = measure(videos, bundle, sources, a.workers)
    return {**out, str(longest): quality}


def main(arguments: list[str] | None = None, run: Callable[[list[str]], None] = train) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curriculum", description="Train, ablate, measure, tabulate.")
    parser.add_argument("--corpus", type=Path, help="encoded corpus with its weights/; needed unless only --page")
    parser.add_argument("--out", type=Path, help="where the legs are kept")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help=f"default {STEPS}")
    parser.add_argument("--legs", help=f"some of {','.join(leg.name for leg in LEGS)}")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--count", type=int, help="only the first cases; 0 measures no videos")
    parser.add_argument("--solver-steps", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help="store the results and write docs/curriculum.md")
    parser.add_argument("--page", action="store_true", help="only write docs/curriculum.md from the stored results")
    a = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    stored = RESULTS / "curriculum.json"
    try:
        if a.page:
            if not stored.is_file():
                raise InputError(f"{stored}: expected the results of a run with --write, there are none")
            (ROOT / PAGE).write_text(page(json.loads(stored.read_text())))
            return 0
        if a.corpus is None or a.out is None:
            raise InputError("expected --corpus and --out")
        found = run_all(a, run)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    document = {"machine": machine(), "legs": found}
    if a.write:
        stored.write_text(json.dumps(document, indent=1) + "\n")
        (ROOT / PAGE).write_text(page(document))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
