"""Peak extra memory of a call: what it needs beyond its inputs and its result.

On a GPU: torch's allocator knows. On a CPU no allocator sees both torch's buffers and the native kernels' own scratch:
the process's resident high-water mark (VmHWM, reset through /proc/self/clear_refs) is read around the *first* call of
that size in a fresh process, after a call on a small input has loaded and set up everything. What a kernel keeps for
its next call is thereby counted too. Linux only; None elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Contender, Inputs, Shape, cached_step, forward, make_inputs

CLEAR = Path("/proc/self/clear_refs")
ROOT = Path(__file__).parent.parent


def _status(key: str) -> int:
    line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _result_bytes(result: Any) -> int:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return sum(t.numel() * t.element_size() for t in parts)


def extra_bytes(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes above what was there before the call, less its result; None where the system does not tell."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _result_bytes(result))
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed but kept pages would hide an allocation
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before - _result_bytes(result))


def contenders_of(task: str, x: Inputs) -> list[Contender]:
    """Those of a task whose memory is asked for, none of their work done yet."""
    return forward(x) if task == "forward" else cached_step(x, x.ref_k.shape[1], 1)


def in_child(task: str, shape: Shape, dtype: torch.dtype, names: list[str], threads: int) -> dict[str, int | None]:
    """Bytes by contender's name, measured in a fresh process on the CPU."""
    given = {**dataclasses.asdict(shape), "task": task, "dtype": str(dtype)[6:], "names": names, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(given)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bench.memory failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description="Memory of one task; used by bench.ops."
    )
    parser.add_argument("given", help="JSON: a shape, its task, dtype, contenders' names, threads")
    given = json.loads(parser.parse_args().given)
    task, dtype, names = given.pop("task"), getattr(torch, given.pop("dtype")), given.pop("names")
    torch.set_num_threads(given.pop("threads"))
    shape = Shape(**given)
    small = dataclasses.replace(shape, rows=64, reference=64, heads=1)
    found: dict[str, int | None] = {}
    warm = {c.name: c for c in contenders_of(task, make_inputs(small, dtype, "cpu"))}
    full = {c.name: c for c in contenders_of(task, make_inputs(shape, dtype, "cpu"))}
    for name in names:
        warm[name].call()
        found[name] = extra_bytes(full[name].call)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
