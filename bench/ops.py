"""Speed of the ops: ``python -m bench.ops [--quick] [--filter WORD] [--store]``.

First the ceilings of this very machine, then tables; every contender is held against fp64 truth before its clock
starts. Repeats take turns; medians of at least 7; ratios are over the baseline of the same table. The last line printed
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from avatar_rt.errors import UnsupportedError
from bench import tables
from bench.harness import ceilings, hardware, peak_of
from bench.report import RESULTS
from bench.run import DTYPES, Run


def show_ceilings(run: Run, machine: dict[str, Any]) -> None:
    print(f"{machine['name']}, {run.threads} thread(s), torch {machine['torch']}, commit {machine['commit']}")
    print(f"clock: {run.clock.name}; load as the run begins: {machine['load']:.1f} of {machine['cores']} cores")
    for name, rate in run.ceilings.items():
        print(f"  {name:14} {rate / 1e9:10.1f} {'GB/s, read and written' if name == 'copy' else 'GFLOP/s'}")
    print("% peak is of", ", ".join(f"{peak_of(run.ceilings, DTYPES[d])[1]} ({d})" for d in run.dtypes), flush=True)


def run_all(run: Run) -> dict[str, Any]:
    """Everything that --filter lets through, as the JSON document."""
    machine = hardware(run.device)
    run.ceilings = ceilings(run.device, run.clock, quick=run.quick)
    show_ceilings(run, machine)
    tables.forward(run)
    tables.backward(run)
    tables.cached_step(run)
    tables.local_attention(run)
    tables.memory_bound(run)
    print()
    return {
        "bench": "ops", "quick": run.quick, "filter": run.word, "machine": machine, "threads": run.threads,
        "clock": run.clock.name, "ceilings": run.ceilings,
        "peak": {d: peak_of(run.ceilings, DTYPES[d])[1] for d in run.dtypes},
        "rows": run.rows, "growth": tables.growth(run), "two_threads": tables.threads(run),
    }  # fmt: skip


def save(document: dict[str, Any]) -> Path:
    """bench/results/ops-<hardware>.json as bench.report reads it: the machine beside the result.

    Of a run of ``--filter threads``, the one reading that wants a quiet machine, its figures go into the stored run,
    each with its own commit. Raises UnsupportedError where no whole run of this hardware is stored.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", document["machine"]["name"].lower()).strip("-")
    path = RESULTS / f"ops-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"machine": document["machine"], "result": document}
    if document["filter"]:
        if not path.exists():
            raise UnsupportedError(f"--store --filter threads: expected a whole run in {path}, there is none")
        stored = json.loads(path.read_text())
        commit = document["machine"]["commit"]
        stored["result"]["two_threads"] = {d: t | {"commit": commit} for d, t in document["two_threads"].items()}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return path


def trace(path: Path, device: str) -> int:
    """One request through the shipped weights, as a profiler sees it."""
    from bench.trace import record

    print(json.dumps({"bench": "trace", "file": str(path), "ranges": record(path, device=device)}))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description="Speed of the ops on this machine.")
    parser.add_argument("--quick", action="store_true", help="small shapes; under a minute on a quiet machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), help="only this one")
    parser.add_argument("--filter", default="", metavar="WORD", help="only cases with WORD in 'table name dtype'")
    parser.add_argument("--flex", action="store_true", help="FlexAttention on the CPU too (compiles for minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the document there")
    parser.add_argument("--store", action="store_true", help="write bench/results/ops-<hardware>.json and the plot")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="instead write a Chrome trace of one request")
    args = parser.parse_args(argv)
    if args.store and (args.quick or args.filter not in ("", "threads") or args.dtype):
        parser.error("--store needs a whole run: no --quick or --dtype, and no --filter but threads")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.trace:
        return trace(args.trace, args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtypes = [args.dtype] if args.dtype else list(DTYPES)
    run = Run(args.device, args.threads, args.quick, dtypes, args.filter, args.flex)
    document = run_all(run)
    wrong = [r for r in run.rows if r["kind"] == "ours" and "refused" in r]
    for row in wrong:
        print(f"error: {row['table']}, {row['case']}, {row['dtype']}: {row['refused']}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(document) + "\n")
    if args.store:
        try:
            from bench.plot import draw

            draw(save(document))
        except UnsupportedError as e:
            print(f"error: {e}", file=sys.stderr)
    print(json.dumps(document))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
