"""Score systems on the cases: ``python -m bench.quality [--cases DIR | --real DIR] --videos DIR [--versus DIR2]``.

A system is a folder of NAME.mp4 with sound, at any size, as ``bench.quality.generate`` writes them and any other
program may; ``NAME=DIR`` gives it a name. ``--degraded`` scores the true videos and copies with one thing wrong each.
Prints a table with the counts of what could not be scored, and last one JSON document. ``--out DIR`` gets scores.csv
and index.html: tables, plots, contact sheets and a player of all systems side by side (``bench.quality.report``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from avatar_rt.errors import AvatarError, InputError
from bench.quality import report
from bench.quality.context import Context
from bench.quality.embedders import available
from bench.quality.generate import add_sources, chosen_sources
from bench.quality.score import DEGRADED, System, means, measures, modules, score, write_csv


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line a measure, one column a system; then what could not be scored or measured."""
    width = max(12, *(len(name) + 1 for name in found))
    lines = [f"{'measure':44}" + "".join(f"{name:>{width}}" for name in found)]
    for m in measures():
        better = {"higher": "+", "lower": "-"}.get(m.better, f"={m.target:g}")
        values = [entry["mean"][m.key] for entry in found.values()]
        shown = "".join(f"{'n/a' if v is None else format(v, '.3f'):>{width}}" for v in values)
        lines.append(f"{m.title[:38] + ' (' + better + ')':44}{shown}")
    for name, entry in found.items():
        bad = ", ".join(f"{count} {problem}" for problem, count in entry["problems"].items())
        lines.append(f"{name}: {entry['scored']} of {entry['cases']} cases scored" + (f"; not: {bad}" if bad else ""))
        lines += [f"  {key}: not measured in {n} of them" for key, n in entry["unmeasured"].items()]
    return lines


def _systems(a: argparse.Namespace) -> list[System]:
    systems = [System(name) for name in DEGRADED] if a.degraded else []
    for text in [t for t in (a.videos, a.versus) if t]:
        name, _, folder = text.rpartition("=")
        path = Path(folder)
        if not path.is_dir():
            raise InputError(f"{path}: expected a folder of videos, there is none")
        systems.append(System(name or path.name, path))
    names = [s.name for s in systems]
    if not systems or len(set(names)) < len(names):
        raise InputError(f"systems: expected --videos or --degraded, each under a name of its own, got {names}")
    return systems


def _page(a: argparse.Namespace, rows: list[dict[str, Any]], systems: list[System]) -> None:
    """The report beside the table. The true videos are shown as ``target``, degraded copies by their figures alone."""
    expectations = report.read_expectations(report.EXPECTED) if a.degraded else []
    folders = {s.name: s.folder for s in systems if s.folder is not None}
    cases = a.cases if a.real is None else None
    report.clear(a.out)
    report.build(rows, measures(), a.out, expectations=expectations, cases=cases, systems=folders, facts=report.about())
    print(f"{a.out / 'index.html'}: the report", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Score videos of the cases.")
    add_sources(parser)
    parser.add_argument("--videos", help="folder of a system's videos, or NAME=FOLDER")
    parser.add_argument("--versus", help="another system's")
    parser.add_argument("--degraded", action="store_true", help=f"score {', '.join(DEGRADED)} too")
    parser.add_argument("--bundle", type=Path, help="whose encoders read the videos; default: the shipped one")
    parser.add_argument("--embedder", type=Path, help="an ArcFace-class ONNX model; default: dlib's")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="folder for scores.csv and the report")
    a = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        if a.embedder is None and (reason := available()) is not None:
            raise InputError(reason)
        sources, systems = chosen_sources(a), _systems(a)
        for name, reason in modules()[1].items():
            print(f"{name} is not measured: {reason}", file=sys.stderr)
        context = Context(a.bundle, a.embedder)
        rows = score(sources, systems, context, workers=max(a.workers, 1), quiet=False)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    found = means(rows)
    print("\n".join(table(found)))
    for row in (r for r in rows if r["status"] != "ok"):
        print(f"{row['system']} {row['case']}: {row['status']}: {row['reason']}")
    if a.out is not None:
        a.out.mkdir(parents=True, exist_ok=True)
        write_csv(a.out / "scores.csv", rows)
        _page(a, rows, systems)
    print(json.dumps({
        "set": "procedural" if a.real is None else "real", "cases": len(sources), "embedder": context.embedder.name,
        "weights": context.engine.bundle.weights_hash[:12], "seconds": round(time.monotonic() - started, 1),
        "workers": a.workers, "not_here": modules()[1], "systems": found,
        "measures": [vars(m) for m in measures()],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
