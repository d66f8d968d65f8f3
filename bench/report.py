"""Results into words: ``python -m bench.report`` prints the README's section; ``--write`` puts it in.

``bench/results/<name>.json`` is the last line that ``python -m bench.<name>`` printed, with the machine it ran on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.stream_page import stages_table, stream_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: python -m bench.report --write -->", "<!-- end of results -->"


def machine() -> dict[str, str | int]:
    """Hardware, versions and commit that a figure travels with."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def store(name: str, line: str) -> Path:
    """Writes a bench's last line with the machine beside it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "result": json.loads(line)}, indent=1) + "\n")
    return path


QUALITY_PAGE = "docs/quality.md"
QUALITY_HEAD = """# Quality, measure by measure

Written by `python -m bench.report --write` from `bench/results/`. The columns beside `truth` and `tiny` are true videos
with one thing wrong each: a measure must tell the copy that is its own (`bench/quality/expected.json`); what it says of
`tiny` counts for as much as it does.
"""
SETS = {
    "procedural": "rendered cases: people, voices and sentences unseen in training",
    "real": "clips of real people (not part of the repository; their names and hashes: `bench/quality/real.csv`)",
}


def _quality(data: dict) -> list[str]:
    """One set of cases in full: a line a measure, a column a system, then everything that could not be scored."""
    r, m = data["result"], data["machine"]
    return [
        "",
        f"## {r['cases']} {SETS[r['set']]}",
        "",
        f"`python -m bench.quality`; encoders of weights {r['weights']}, faces by {r['embedder']}, commit "
        f"{m['commit']}, {m['cpu']}, {r['workers']} processes, {r['seconds']:.0f} s.",
        "",
        *_measured(r["measures"], {name: s["mean"] for name, s in r["systems"].items()}),
        "",
        *_scored(r, r["systems"]),
    ]


def _summary(sets: list[dict]) -> list[str]:
    """The shipped weights on every set, beside the true videos, then everything that could not be scored."""
    columns, scored = {}, []
    commits: dict[str, list[str]] = {}
    for data in sets:
        r = data["result"]
        commits.setdefault(data["machine"]["commit"], []).append(r["set"])
        shown = {name: r["systems"][name] for name in ("truth", "tiny") if name in r["systems"]}
        columns |= {f"{name}, {r['cases']} {r['set']}": system["mean"] for name, system in shown.items()}
        scored += ["", *_scored(r, shown)]
    # One commit, or the sets that each of them measured.
    at = ", ".join(c if len(commits) == 1 else f"{c} ({' and '.join(found)})" for c, found in commits.items())
    return [
        "",
        f"Weights {sets[0]['result']['weights']}, commit {at}; copies with known faults beside them: `{QUALITY_PAGE}`.",
        "",
        *_measured(r["measures"], columns),
        *scored,
    ]


def _scored(result: dict, systems: dict[str, dict]) -> list[str]:
    counts = "; ".join(_counts(name, system) for name, system in systems.items())
    lines = [f"Scored of the {result['set']} cases: {counts}."]
    absent = [f"{name} ({reason})" for name, reason in result["not_here"].items()]
    return lines + ([f"Not measured on that machine: {', '.join(absent)}."] if absent else [])


def _measured(measures: list[dict], columns: dict[str, dict]) -> list[str]:
    lines = [f"| measure | better | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for measure in measures:
        values = [means.get(measure["key"]) for means in columns.values()]
        if all(v is None for v in values):
            continue
        unit = f", {measure['unit']}" if measure["unit"] else ""
        better = f"{measure['target']:g}" if measure["better"] == "target" else measure["better"]
        shown = " | ".join("n/a" if v is None else f"{v:.3g}" for v in values)
        lines.append(f"| {measure['title']}{unit} | {better} | {shown} |")
    return lines


def _counts(name: str, system: dict) -> str:
    """``tiny 34 of 36 (1 missing, 1 no_face; sync_lag in 30)``."""
    bad = [f"{count} {problem}" for problem, count in system["problems"].items()]
    partly = [f"{key} in {system['scored'] - n}" for key, n in system["unmeasured"].items() if n < system["scored"]]
    notes = "; ".join(", ".join(part) for part in (bad, partly) if part)
    return f"{name} {system['scored']} of {system['cases']}" + (f" ({notes})" if notes else "")


def _trust(sync: dict, identity: dict | None) -> list[str]:
    """How often the scorers themselves are right: shift tests of sync, people told apart by the face embedding."""
    where = {"corpus": "corpus clips of held-out people", "cases": "true videos of the cases", "real": "real clips"}
    found = [
        f"{f['right']:.0%} of {f['clips']} x {f['shifts']} {where[name]}" for name, f in sync.get("figures", {}).items()
    ]
    lines = [
        "",
        "Can these measures be trusted? Sound moved by -10 to 10 frames is found again within one frame in "
        f"{', '.join(found)} (`python -m bench.quality.sync`); LSE-C* and LSE-D* are of our own scorer and not "
        "comparable with published LSE.",
    ]
    if identity is not None:
        r = identity["result"]
        told = [
            f"AUC {r[kind]['auc']:.4f} over {r[kind]['people']} {who}"
            for kind, who in (
                ("procedural", "rendered people across scenes"),
                ("real", "real people, halves of a clip"),
            )
            if kind in r
        ]
        lines[-1] += (
            f" The face embedding tells people apart with {', '.join(told)} (`python -m bench.quality.identity`)."
        )
    return lines


def ops_results() -> list[Path]:
    """Stored runs of ``python -m bench.ops``, one per machine, CPUs first."""
    found = [(json.loads(p.read_text())["machine"]["device"] != "cpu", p) for p in sorted(RESULTS.glob("ops-*.json"))]
    return [p for _, p in sorted(found)]


def _ops(data: dict) -> list[str]:
    """One machine's table: ours against the baseline of each case, ratios of medians."""
    r, m = data["result"], data["machine"]
    where = f"{r['threads']} thread(s), {r['clock']}" if m["device"] == "cpu" else r["clock"]
    rates = ", ".join(
        f"{k.replace('_', ' ')} {v / 1e9:.0f} {'GB/s' if k == 'copy' else 'GFLOP/s'}" for k, v in r["ceilings"].items()
    )
    lines = [
        "",
        f"Speed of the ops on {m['name']} (`python -m bench.ops`; {where}, torch {m['torch']}, commit {m['commit']}).",
        f"Measured ceilings: {rates}. After a slash: with the reference packed beforehand.",
        "",
        "| op | case | dtype | baseline | baseline, ms | ours, ms | baseline over ours | of peak | extra MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple, list[dict]] = {}
    for row in r["rows"]:
        if "median_ms" in row:
            cases.setdefault((row["table"], row["case"], row["words"], row["dtype"]), []).append(row)
    for key in _longest(list(cases)):
        lines += _ops_row(key, cases[key])
    for (table, case, _, dtype), rows in cases.items():
        lines += _int8(case, dtype, rows) if "forward" in table and case.startswith("fixed") else []
    for dtype, g in r["growth"].items():
        if g["fit"]:
            last = g["points"][-1]
            ratio = (
                f" At R={last['R']} dense attention takes {last['dense'] / last[g['fit_of']]:.0f}x."
                if "dense" in last
                else ""
            )
            lines += [
                "",
                f"Growth over reference length, {dtype}: a straight line fits with R² = {g['fit']['r2']:.4f}.{ratio}",
            ]
    for dtype, t in r["two_threads"].items():
        said = (
            f"{t['speedup']:.2f}x one" + (f" (commit {t['commit']})" if "commit" in t else "")
            if t["load"] < 0.5
            else f"not measured, the machine was busy (load {t['load']:.1f})"
        )
        lines += ["", f"Two threads, {dtype}: {said}."]
    picture = RESULTS / ("ops-growth.png" if m["device"] == "cpu" else "ops-growth-gpu.png")
    if picture.exists():
        lines += ["", f"![Time of a step over reference length]({picture.relative_to(ROOT).as_posix()})"]
    return lines


def _longest(keys: list[tuple]) -> list[tuple]:
    """Of a preset's cases with "<preset> <seconds> s" names, the one with the longest reference; all others."""
    longest: dict[tuple, float] = {}
    for table, case, _, dtype in keys:
        preset, _, rest = case.partition(" ")
        if rest.endswith(" s"):
            seen = longest.get((table, preset, dtype), 0.0)
            longest[table, preset, dtype] = max(seen, float(rest[:-2]))
    return [
        k for k in keys
        if not k[1].endswith(" s") or float(k[1].split()[1]) == longest[k[0], k[1].split()[0], k[3]]
    ]  # fmt: skip


def _ops_row(key: tuple, rows: list[dict]) -> list[str]:
    table, case, words, dtype = key
    ours = [x for x in rows if x["name"] in ("ours", "ours, reference packed")]
    base = next((x for x in rows if x["kind"] == "baseline"), None)
    if not ours or base is None:
        return []

    def each(form: str, name: str) -> str:
        return " / ".join(format(x[name], form) for x in ours if x.get(name) is not None)

    share = each(".0%", "of_peak") or f"{each('.0%', 'of_copy')} of copy"
    extra = " / ".join(f"{x['extra_bytes'] / 2**20:.0f}" for x in ours if x.get("extra_bytes") is not None)
    title = f"{case}: {words}" if case.endswith(" s") else words
    return [
        f"| {table} | {title} | {dtype} | {base['name']} | {base['median_ms']:.4g} | {each('.4g', 'median_ms')} "
        f"| {each('.2f', 'times_baseline')} | {share} | {extra} |"
    ]


def _int8(case: str, dtype: str, rows: list[dict]) -> list[str]:
    by_name = {x["name"]: x for x in rows}
    row, plain = by_name.get("ours, reference packed as int8"), by_name.get("ours")
    if row is None or plain is None:
        return []
    size = f"{row['reference_bytes_over_plain']:.0%} of the bytes, {row['median_ms']:.4g} ms"
    error = f"largest error {row['error']:.1e} (plain {plain['error']:.1e})"
    return ["", f"int8 reference, {case}, {dtype}: {size}, {error}."]


def quality_results() -> list[dict]:
    """Stored runs of ``python -m bench.quality``, rendered cases first."""
    paths = (RESULTS / f"{name}.json" for name in ("quality", "quality-real"))
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def quality_page() -> str:
    return QUALITY_HEAD + "\n".join(line for data in quality_results() for line in _quality(data)) + "\n"


def section() -> str:
    lines = []
    if sets := quality_results():
        identity = RESULTS / "quality-identity.json"
        card = json.loads((ROOT / "bench" / "quality" / "weights" / "sync.json").read_text())
        lines += _summary(sets) + _trust(card, json.loads(identity.read_text()) if identity.exists() else None)
    for name, table in (("stream", stream_table), ("stages", stages_table)):
        for path in sorted(RESULTS.glob(f"{name}-*.json")):
            lines += table(json.loads(path.read_text()))
    for path in ops_results():
        lines += _ops(json.loads(path.read_text()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="README's results from bench/results.")
    parser.add_argument("--write", action="store_true", help="put the section into README.md")
    parser.add_argument(
        "--store", metavar="NAME", help="first store standard input's last line as bench/results/NAME.json"
    )
    args = parser.parse_args()
    if args.store:
        store(args.store, sys.stdin.read().strip().splitlines()[-1])
    text = section()
    print(text)
    if args.write:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
        (ROOT / QUALITY_PAGE).write_text(quality_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
