"""What every speed bench shares: ceilings, a clock, interleaved repeats, the check before the clock, a linear fit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rt.errors import UnsupportedError
from avatar_rt.ops import _load
from bench.report import machine
from tests.tolerance import ulp, worst

REPEATS = 7
SAMPLE_SECONDS = 2e-3  # a shorter call is repeated within a sample, so that the clock's own cost vanishes


@dataclass
class Contender:
    """One way to compute a result.

    Attributes:
        name: How the table calls it.
        call: Computes the result from inputs that are there already.
        kind: ``ours``, ``baseline`` (ratios are over it; there is one) or ``other``.
        limit: Repeats at most, for what takes half a minute.
        pairs: Attended pairs over those of the task, where it computes more than it was asked for.
        coarse: Its storage is coarser than its dtype: checked against torch on inputs rounded the same way.
    """

    name: str
    call: Callable[[], Any]
    kind: str = "other"
    limit: int = 10**9
    pairs: float = 1.0
    coarse: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """Seconds of a call: CUDA events on a GPU; CPU time of the one thread, which a busy machine cannot stretch; wall
    time when there are several threads."""

    device: str
    threads: int

    @property
    def name(self) -> str:
        return "cuda events" if self.device != "cpu" else "thread CPU time" if self.threads == 1 else "wall time"

    def __call__(self, call: Callable[[], Any], inner: int = 1) -> float:
        if self.device != "cpu":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / inner
        now = time.thread_time if self.threads == 1 else time.perf_counter
        started = now()
        for _ in range(inner):
            call()
        return (now() - started) / inner


def interleave(contenders: Sequence[Contender], clock: Clock, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds per call by name. Rounds take turns, every second one backwards, so that drift hits all alike."""
    inner, times = {}, {c.name: [] for c in contenders}
    for c in contenders:
        first = clock(c.call)
        inner[c.name] = max(1, min(1000, round(SAMPLE_SECONDS / max(first, 1e-7))))
    for turn in range(repeats):
        for c in contenders if turn % 2 == 0 else reversed(contenders):
            if turn < c.limit:
                times[c.name].append(clock(c.call, inner[c.name]))
    return times


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    return {
        "median_ms": float(np.median(seconds)) * 1e3,
        "p90_ms": float(np.quantile(seconds, 0.9)) * 1e3,
        "repeats": len(seconds),
    }


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares y = intercept + slope x, and the share R^2 of y's variance that it explains."""
    assert len(x) == len(y) >= 2
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope, intercept = np.polyfit(a, b, 1)
    spread = ((b - b.mean()) ** 2).sum()
    rest = ((b - intercept - slope * a) ** 2).sum()
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - rest / spread) if spread > 0 else 1.0}


# --- the check before the clock --------------------------------------------------------------------------------------


def _parts(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


@dataclass(frozen=True)
class Judge:
    """Holds a result against fp64 truth; the policy is the tests': twice plain torch's error, plus one ulp.

    Attributes:
        truth: fp64 tensors, one per result.
        plain: Torch's own results in the dtype of the inputs, same shapes.
        pick: What of a contender's result is compared (truth may hold a sample of its rows).
    """

    truth: list[Tensor]
    plain: list[Tensor]
    pick: Callable[[Tensor], Tensor] = lambda x: x

    def __call__(self, result: Any) -> dict[str, Any]:
        """``error`` and ``limit`` over all results, worst ratio first; ``refused`` when it may not post a number."""
        got = _parts(result)
        if len(got) != len(self.truth):
            return {"error": None, "limit": None, "refused": f"expected {len(self.truth)} results, got {len(got)}"}
        verdicts = []
        for g, plain, truth in zip(got, self.plain, self.truth, strict=True):
            if not g.isfinite().all():
                return {"error": None, "limit": None, "refused": "not finite"}
            g = self.pick(g)
            if g.shape != truth.shape or g.dtype != plain.dtype:
                said = f"expected {list(truth.shape)} {plain.dtype}, got {list(g.shape)} {g.dtype}"
                return {"error": None, "limit": None, "refused": said}
            verdicts.append((worst(g, truth), 2 * worst(plain, truth) + ulp(truth, g.dtype)))
        error, limit = max(verdicts, key=lambda v: v[0] / v[1] if v[1] else float(v[0] > 0))
        row: dict[str, Any] = {"error": error, "limit": limit}
        if not error <= limit:
            row["refused"] = f"error {error:.1e} is above {limit:.1e}"
        return row


def contest(
    contenders: Sequence[Contender],
    judge: Judge,
    clock: Clock,
    *,
    flops: float,
    moved: float,
    peak: float | None,
    repeats: int = REPEATS,
    coarse: Judge | None = None,
) -> list[dict[str, Any]]:
    """One row per contender: checked first, then timed in turns with the others. A refused one has no time.

    Args:
        flops, moved: FLOPs and bytes of the task, for rates.
        peak: FLOP/s of the machine with the threads in use, or None.
        coarse: Judge of the contenders whose storage is coarse.
    """
    rows: dict[str, dict[str, Any]] = {}
    fit, once = [], {}
    for c in contenders:
        results: list[Any] = []
        try:
            once[c.name] = clock(lambda c=c, kept=results: kept.append(c.call()))
            row = (coarse if c.coarse and coarse else judge)(results.pop())
        except (RuntimeError, NotImplementedError, UnsupportedError) as e:
            row = {"error": None, "limit": None, "refused": f"does not run: {str(e).strip().splitlines()[0][:120]}"}
        rows[c.name] = {"name": c.name, "kind": c.kind, **row, **c.notes}
        if "refused" not in row:
            fit.append(c)
    times = interleave([c for c in fit if c.limit > 1], clock, repeats)
    times |= {c.name: [once[c.name]] for c in fit if c.limit == 1}  # the checked call is the timed one
    base = next((np.median(times[c.name]) for c in fit if c.kind == "baseline"), None)
    for c in fit:
        middle = float(np.median(times[c.name]))
        row = rows[c.name]
        row |= summary(times[c.name])
        row["gflops"] = flops * c.pairs / middle / 1e9
        row["gb_per_s"] = moved / middle / 1e9
        if peak:
            row["of_peak"] = flops * c.pairs / middle / peak
        if base is not None:
            row["times_baseline"] = float(base / middle)
    return list(rows.values())


# --- ceilings --------------------------------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, Any]:
    """The machine a figure travels with; ``load`` is what others asked of it as the bench began."""
    info = {**machine(), "device": "cpu", "name": machine()["cpu"], "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    module = _load.native()[0]
    info["isa"] = module.isas()[-1] if module else "none"
    if device != "cpu":
        p = torch.cuda.get_device_properties(device)
        info |= {"device": device, "name": p.name, "cuda": torch.version.cuda, "sms": p.multi_processor_count}
    return info


def _best(call: Callable[[], Any], clock: Clock, repeats: int) -> float:
    call()
    return min(clock(call) for _ in range(repeats))


def ceilings(device: str, clock: Clock, *, quick: bool = False) -> dict[str, float]:
    """Rates of this machine with the threads in use: FLOP/s of matmul and, on a CPU, of FMA; bytes/s of a copy."""
    gpu = device != "cpu"
    n = 8192 if gpu else 512 if quick else 2048
    found = {}
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{word}"] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, clock, REPEATS)
    source = torch.empty((1 << 30) if gpu else (1 << 24) if quick else (1 << 28), dtype=torch.uint8, device=device)
    source.fill_(1)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / _best(lambda: target.copy_(source), clock, REPEATS)
    module = _load.native()[0]
    if not gpu and hasattr(module, "fma_peak"):  # GFLOP/s of one core, from registers alone
        for word, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            rates = [module.fma_peak(dtype, 0.02 if quick else 0.2) for _ in range(REPEATS)]
            found[f"fma_{word}"] = 1e9 * clock.threads * max(rates)
    return found


def peak_of(found: dict[str, float], dtype: torch.dtype) -> tuple[float, str]:
    """The highest measured FLOP/s in a dtype, and what measured it."""
    word = "bf16" if dtype == torch.bfloat16 else "fp32"
    rates = {k: v for k, v in found.items() if k in (f"matmul_{word}", f"fma_{word}")}
    name = max(rates, key=lambda k: rates[k])
    return rates[name], name
