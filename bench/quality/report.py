"""One command from a table of results to a page: ``python -m bench.quality.report --rows results.csv --out DIR``.

``--cases DIR`` (case/reference.mp4, case/target.mp4) and ``--videos SYSTEM=DIR`` (case.mp4) add contact sheets and a
player of all systems side by side. ``--versus SYSTEM`` is the one that the others are compared with, by default the
first of the table. ``--expect FILE`` holds what degraded systems must do to the measures. DIR/index.html opens from the
disk and needs nothing else. The last line printed is one JSON document.

The degraded copies of the true videos are judged by ``--expect bench/quality/expected.json``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from avatar_rt.errors import AvatarError, InputError
from bench.quality import pages, plots, videos
from bench.quality.documents import read_json
from bench.quality.expected import Expectation, Outcome, check, read_expectations
from bench.quality.measure import MODULES, Measure
from bench.quality.statistics import (
    NAMES,
    NO_ROW,
    NOT_MEASURED,
    Comparison,
    Summary,
    cases_of,
    compare,
    read_rows,
    summarise,
    systems_of,
)

EXPECTED = Path(__file__).parent / "expected.json"
FAMILIES = (*MODULES, "qalign")  # Q-Align's figures come from elsewhere: its model is the user's
COLUMNS, HEIGHT = 8, 96  # of a strip of frames
REFERENCE, TARGET = "reference", "target"


@dataclass(frozen=True)
class Shown:
    """A case in the page: {who: its strip} and {system: its video}, paths from the page's folder."""

    name: str
    strips: dict[str, str]
    videos: dict[str, str]


def known_measures() -> tuple[Measure, ...]:
    """The measures of this repository, by family."""
    names = [f"bench.quality.{family}" for family in FAMILIES]
    return tuple(m for name in names if importlib.util.find_spec(name) for m in importlib.import_module(name).MEASURES)


def read_measures(path: Path) -> tuple[Measure, ...]:
    """Measures of columns that another program adds, as a list in JSON. Raises: InputError on another file."""
    try:
        return tuple(Measure(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        expected = ", ".join(f.name for f in fields(Measure))
        raise InputError(f"{path}: expected a list of measures in JSON with {expected}, got {e}") from None


def _failure(system: str, case: str, what: str, status: str, why: str) -> dict[str, str]:
    return {"system": system, "case": case, "what": what, "status": status, "why": why}


def failures_of(rows: Sequence[Mapping], summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """Every (system, case) without a result, then every value that is missing in a row that is ok."""
    cases, found = cases_of(rows), []
    for system in systems_of(rows):
        of_case = {r["case"]: r for r in rows if r["system"] == system}
        for case in cases:
            row = of_case.get(case, {"status": NO_ROW})
            if row["status"] != "ok":
                status, why = row["status"] or "no status", row.get("reason") or ""
                found.append(_failure(system, case, "all measures", status, why))
    for s in summaries:
        missed = (f for f in s.failures if f.status == NOT_MEASURED)
        found += [_failure(s.system, f.case, s.measure.title, NOT_MEASURED, f.reason) for f in missed]
    return found


def _joined(failures: Sequence[dict[str, str]], names: Sequence[str], cases: Sequence[str]) -> list[dict[str, str]]:
    """Failures told in the same words as one, their cases side by side; then systems with the same cases as one."""
    of_case: dict[tuple[str, ...], list[str]] = {}
    for f in failures:
        of_case.setdefault((f["what"], f["status"], f["why"], f["system"]), []).append(f["case"])
    of_system: dict[tuple[str, ...], list[str]] = {}
    for (what, status, why, system), some in of_case.items():
        told = f"all {len(cases)} cases" if len(some) == len(cases) else ", ".join(some)
        of_system.setdefault((what, status, why, told), []).append(system)
    return [
        _failure("every system" if set(names) <= set(some) else ", ".join(some), told, what, status, why)
        for (what, status, why, told), some in of_system.items()
    ]


def show_cases(
    cases: Sequence[str], folder: Path | None, systems: Mapping[str, Path], out: Path
) -> tuple[list[Shown], list[dict]]:
    """Writes strips and videos into ``out``; gives the cases and the videos that are missing or cannot be read."""
    sources = {name: videos.find_videos(path) for name, path in systems.items()}
    given = {} if folder is None else {k: videos.case_videos(folder, k) for k in (REFERENCE, TARGET)}
    shown, failed = [], []
    for case in cases:
        strips: dict[str, str] = {}
        played: dict[str, str] = {}
        for number, (who, found) in enumerate((given | sources).items()):
            if case not in found:
                failed.append(_failure(who, case, "video", "no video", "there is none of that name"))
                continue
            try:
                copy, clip = videos.to_browser(found[case], out / "videos" / f"{number:02d}", case)
            except InputError as e:
                failed.append(_failure(who, case, "video", "unreadable video", str(e)))
                continue
            picture = videos.strip(clip.frames, COLUMNS, HEIGHT)
            path = videos.write_picture(out / "strips" / f"{number:02d}" / f"{case}.jpg", picture)
            strips[who], played[who] = path.relative_to(out).as_posix(), copy.relative_to(out).as_posix()
        shown.append(Shown(case, strips, played))
    return shown, failed


def about() -> dict[str, str]:
    """Machine, commit and the shipped weights' hash, for the page's head."""
    from avatar_rt.runtime.manifest import open_bundle, shipped_bundle
    from bench.report import machine

    here = {key: str(value) for key, value in machine().items()}
    return here | {"weights": f"tiny {open_bundle(shipped_bundle()).weights_hash[:12]}"}


def _about_from(path: Path) -> dict[str, str]:
    found = read_json(path, "names and values in JSON")
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected names and values in JSON, got {type(found).__name__}")
    return {str(k): str(v) for k, v in found.items() if isinstance(v, str | int | float)}


def build(
    rows: Sequence[dict], measures: Sequence[Measure], out: Path, *, versus: str | None = None,
    expectations: Sequence[Expectation] = (), cases: Path | None = None, systems: Mapping[str, Path] | None = None,
    facts: Mapping[str, str] | None = None, title: str = "Quality of generated video",
) -> dict[str, Any]:  # fmt: skip
    """Writes the page into ``out`` and gives the document of the last line.

    Args:
        rows: The table; columns without a measure are named in the page and not shown.
        versus: The system that every other one is compared with; None is the table's first.
        cases, systems: Folders of cases and of videos, see ``videos``.
        facts: What the page's head says of the run.

    Raises: InputError on a ``versus`` that is not in the table, or a table without any known measure.
    """
    names, all_cases = systems_of(rows), cases_of(rows)
    columns = dict.fromkeys(k for row in rows for k in row if k not in NAMES)
    measures = [m for m in measures if m.key in columns]
    if not measures:
        raise InputError(f"rows: expected a column of a known measure, got {', '.join(columns) or 'none'}")
    versus = versus or names[0]
    if versus not in names:
        raise InputError(f"--versus: expected one of {', '.join(names)}, got {versus}")
    out.mkdir(parents=True, exist_ok=True)
    table = [[summarise(rows, m, system) for system in names] for m in measures]
    comparisons = {name: compare(rows, measures, name, versus) for name in names if name != versus}
    outcomes = check(rows, measures, expectations)
    shown, unseen = show_cases(all_cases, cases, systems or {}, out) if cases or systems else ([], [])
    failures = failures_of(rows, [s for row in table for s in row]) + unseen
    document = _document(table, comparisons, outcomes, failures, all_cases, out)
    page = pages.render(
        "report.html", title=title, facts=facts or {}, systems=names, cases=all_cases, versus=versus,
        ok={n: sum(r["system"] == n and r["status"] == "ok" for r in rows) for n in names},
        groups=_groups(table), comparisons=comparisons, outcomes=outcomes, failures=_joined(failures, names, all_cases),
        failed=len(failures), shown=shown,
        unknown=[c for c in columns if c not in {m.key for m in measures}], link=plots.link,
        colours={n: plots.colour(i) for i, n in enumerate(names)}, data=_player_data(rows, measures, shown, names),
    )  # fmt: skip
    (out / "index.html").write_text(page, encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def _groups(table: Sequence[Sequence[Summary]]) -> list[dict[str, Any]]:
    groups = dict.fromkeys(row[0].measure.group for row in table)
    found = []
    for group in groups:
        rows = [row for row in table if row[0].measure.group == group]
        best = [min((s.measure.cost(s.mean) for s in row if s.values), default=None) for row in rows]
        plot = plots.distributions(group, rows)
        found.append({"name": group, "rows": list(zip(rows, best, strict=True)), "plot": plot})
    return found


def _player_data(
    rows: Sequence[dict], measures: Sequence[Measure], shown: Sequence[Shown], names: Sequence[str]
) -> dict:
    values: dict[str, dict] = {}
    for row in rows:
        numbers = {m.key: row[m.key] for m in measures if m.key in row} if row["status"] == "ok" else {}
        values.setdefault(row["case"], {})[row["system"]] = {"status": row["status"], "values": numbers}
    told = [{f.name: getattr(m, f.name) for f in fields(m)} for m in measures]
    cases = [{"name": s.name, "id": plots.link(s.name), "videos": s.videos} for s in shown]
    return pages.plain({"measures": told, "systems": list(names), "cases": cases, "values": values})


def _document(
    table: Sequence[Sequence[Summary]], comparisons: Mapping[str, Sequence[Comparison]],
    outcomes: Sequence[Outcome], failures: Sequence[dict], cases: Sequence[str], out: Path,
) -> dict[str, Any]:  # fmt: skip
    return pages.plain({
        "page": str(out / "index.html"), "cases": len(cases), "failures": len(failures),
        "measures": {
            row[0].measure.key: {
                s.system: {"mean": s.mean, "low": s.low, "high": s.high, "n": len(s.values), "of": len(cases)}
                for s in row
            } for row in table
        },
        "comparisons": [
            {"measure": c.measure.key, "a": c.a, "b": c.b, "n": len(c.cases), "gain": c.gain, "low": c.low,
             "high": c.high, "p": c.p, "p_holm": c.p_holm, "verdict": c.verdict}
            for found in comparisons.values() for c in found
        ],
        "expected": {v: sum(o.verdict == v for o in outcomes) for v in ("pass", "fail", "not checked")},
    })  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.report", description="A page from results.")
    parser.add_argument("--rows", type=Path, required=True, help="the table, CSV")
    parser.add_argument("--out", type=Path, required=True, help="a folder, made anew")
    parser.add_argument("--cases", type=Path, help="folder of cases: CASE/reference.mp4, CASE/target.mp4")
    parser.add_argument("--videos", action="append", default=[], metavar="SYSTEM=DIR", help="CASE.mp4 of one system")
    parser.add_argument("--versus", help="the system to compare with; the table's first")
    parser.add_argument(
        "--expect", type=Path, help="what degraded systems must do, JSON, as bench/quality/expected.json"
    )
    parser.add_argument("--measures", type=Path, help="measures of further columns, JSON")
    parser.add_argument("--about", type=Path, help="names and values for the head, JSON; this machine")
    parser.add_argument("--title", default="Quality of generated video")
    a = parser.parse_args(arguments)
    try:
        rows, systems = read_rows(a.rows), videos.parse_systems(a.videos)
        measures = known_measures() + (read_measures(a.measures) if a.measures else ())
        expectations = read_expectations(a.expect) if a.expect else []
        facts = _about_from(a.about) if a.about else about()
        if a.cases and not a.cases.is_dir():
            raise InputError(f"--cases: there is no folder {a.cases}")
        clear(a.out)
        document = build(
            rows, measures, a.out, versus=a.versus, expectations=expectations, cases=a.cases, systems=systems,
            facts=facts, title=a.title,
        )  # fmt: skip
        shutil.copyfile(a.rows, a.out / "results.csv")
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{a.out / 'index.html'}: {document['cases']} cases, {document['failures']} failures", file=sys.stderr)
    print(json.dumps(document))
    return 0


def clear(out: Path) -> None:
    """Removes an earlier report, so that no old picture stays. Raises: InputError on a folder that is none."""
    strangers = out.is_dir() and {p.name for p in out.iterdir()} - {"scores.csv"}
    if strangers and not (out / "summary.json").is_file():
        raise InputError(f"{out}: expected an empty folder or an earlier report, got a folder with other files")
    for part in ("videos", "strips"):
        shutil.rmtree(out / part, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
