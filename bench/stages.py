"""Where the time of a request goes: ``python -m bench.stages [--bundle DIR] [--threads N] [--seconds S] [--store]``.

Milliseconds of each stage, CPU time of the whole process beside wall time: the reference once, then per chunk the
sound, the solver's steps, the decoder and the writer; and the peak memory of the process. The last line printed is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avatar_rt.runtime.trace import watched_by
from bench.harness import hardware
from bench.report import RESULTS
from bench.stream import Request

PER_CHUNK = ("speech", "denoise", "decode", "write")


class Clocks:
    """Time within each range of ``runtime.trace``: every call's wall and CPU seconds, by name."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            self.calls.setdefault(name, []).append(spent)

    def rows(self, warm: int = 1) -> dict[str, dict[str, float]]:
        """Medians over the calls after the first ``warm`` ones, where there are more; milliseconds."""
        rows = {}
        for name, calls in self.calls.items():
            kept = calls[warm:] or calls
            rows[name] = {
                "calls": len(calls),
                "wall_ms": float(np.median([w for w, _ in kept])) * 1e3,
                "cpu_ms": float(np.median([c for _, c in kept])) * 1e3,
            }
        return rows


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def record(bundle: Path | None, seconds: float, steps: int | None) -> dict[str, Any]:
    """One request, stage by stage; memory before the request and at its peak."""
    clocks = Clocks()
    with tempfile.TemporaryDirectory() as folder:
        with watched_by(clocks.range):
            request = Request(bundle, seconds, Path(folder), 1, steps)
        loaded = peak_mib()
        request.ours()  # warm: first calls allocate
        clocks.calls = {k: v for k, v in clocks.calls.items() if k.startswith("reference")}
        with watched_by(clocks.range):
            marks = request.ours()
        cfg = request.engine.config
    stages = clocks.rows()
    chunk = sum(stages[n]["cpu_ms"] for n in PER_CHUNK if n in stages)
    return {
        "config": cfg.name, "size": [cfg.height, cfg.width], "steps": len(request.schedule.times) - 1,
        "passes": len(request.schedule.passes), "weights": request.engine.bundle.weights_hash[:12],
        "stages": stages, "chunk_cpu_ms": chunk, "frames": marks.at[-1][2],
        "peak_mib": {"loaded": loaded, "generated": peak_mib()},
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    print(f"{'stage':20}{'calls':>7}{'wall ms':>10}{'CPU ms':>10}{'of chunk':>10}")
    for name, r in sorted(found["stages"].items(), key=lambda item: -item[1]["cpu_ms"]):
        share = f"{r['cpu_ms'] / found['chunk_cpu_ms']:.0%}" if name in PER_CHUNK else ""
        print(f"{name:20}{r['calls']:>7}{r['wall_ms']:>10.2f}{r['cpu_ms']:>10.2f}{share:>10}")
    peak = found["peak_mib"]
    print(
        f"peak memory: {peak['loaded']:.0f} MiB with the person prepared, {peak['generated']:.0f} MiB in all",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description="Where the time of a request goes.")
    parser.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of speech (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the bundle's)")
    parser.add_argument("--store", action="store_true", help="write bench/results/stages-<hardware>-<size>-<threads>")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = hardware("cpu")
    print(f"{machine['name']}, {args.threads} thread(s), torch {machine['torch']}, commit {machine['commit']}")
    found = record(args.bundle, args.seconds, args.steps)
    show(found)
    document = {"bench": "stages", "machine": machine, "threads": args.threads, "seconds": args.seconds, **found}
    if args.store:
        slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
        path = RESULTS / f"stages-{slug}-{found['size'][0]}px-{args.threads}.json"
        path.write_text(json.dumps({"machine": machine, "result": document}, indent=1) + "\n")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
