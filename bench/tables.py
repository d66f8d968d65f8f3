"""The tables of ``python -m bench.ops``: attention forward and backward, a cached step, local attention, the pieces
around attention, and how time grows with reference length and shrinks with threads."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from avatar_rt import ops
from avatar_rt.config import preset
from bench import contenders as attention
from bench.contenders import Shape
from bench.harness import REPEATS, Clock, Contender, interleave, linear_fit, summary
from bench.pieces import local, pieces
from bench.run import DTYPES, Run

SECONDS = (1, 10, 30, 120)  # of reference
BACKWARD_PAIRS = 8e7  # G (G + R) up to which fp64 truth of the gradients fits a small machine
LINES = {
    attention.OURS: "ours",
    attention.PACKED: "packed",
    attention.SDPA: "sdpa",
    attention.DENSE: "dense",
}  # of the growth picture
ONCE = 1  # such a contender is timed by the very call that is checked


def fixed_shapes(run: Run) -> list[Shape]:
    """Sizes that do not change with the presets: figures can be compared over the years."""
    if run.quick:
        return [Shape("fixed d=64", 128, 512, 2, 64)]
    if run.gpu:
        sizes = ((2048, 8192), (2048, 32768), (8192, 32768))
        return [Shape(f"fixed d={d} G={g} R={r}", g, r, 24, d) for d in (64, 128) for g, r in sizes]
    return [Shape(f"fixed d={d}", 2048, 8192, 8, d) for d in (64, 128)]


def shapes(run: Run, seconds: tuple[float, ...], flops: float) -> dict[str, Shape]:
    """The fixed ones, then every preset over seconds of reference, cut to what this machine can repeat."""
    presets = attention.preset_shapes(seconds, 5e13 if run.gpu else flops)
    if run.quick:
        presets = [attention.preset_shape(preset("tiny"), 1)]
    return {s.name: s for s in (*fixed_shapes(run), *presets)}


def forward(run: Run) -> None:
    fixed, found = {s.name for s in fixed_shapes(run)}, shapes(run, SECONDS, 4e10)
    for name, dtype in run.cases("target over all, forward", list(found)):
        shape = found[name]
        x = attention.make_inputs(shape, DTYPES[dtype], run.device)
        who = attention.forward(x, everybody=name in fixed, with_flex=run.with_flex)
        judge = attention.reference_judge(x)
        coarse = attention.int8_judge(judge, x) if any(c.coarse for c in who) else None
        rows = run.contest(who, judge, shape.flops, x.moved, dtype, coarse)
        # Longest and fixed: the others lie between. Quick: once, for a child process costs seconds.
        costly = run.quick and dtype != run.dtypes[0]
        if name.endswith(f" {SECONDS[-1]} s") or (name in fixed and not costly):
            run.add_memory("forward", shape, dtype, who, rows)
        run.post("target over all, forward", name, shape.words(), dtype, rows)


def backward(run: Run) -> None:
    found = {n: s for n, s in shapes(run, (1, 10), 2e10).items() if s.rows * (s.rows + s.reference) <= BACKWARD_PAIRS}
    for name, dtype in run.cases("target over all, backward", list(found)):
        shape = found[name]
        x = attention.make_inputs(shape, DTYPES[dtype], run.device)
        who = attention.backward(x)
        judge = attention.backward_judge(x, who[-1].call())
        # A backward pass is 2.5 forward ones; it moves every operand and its gradient.
        rows = run.contest(who, judge, 2.5 * shape.flops, 2 * x.moved, dtype)
        run.post("target over all, backward", name, shape.words(), dtype, rows)


def cached_step(run: Run) -> None:
    """G rows over a cached reference, against computing everything again. Dense at R = 16 G runs once on a CPU."""
    g = 128 if run.quick else 2048
    repeats = {4 * g: REPEATS, 16 * g: REPEATS if run.quick or run.gpu else ONCE}
    found = {f"R={r}": Shape(f"R={r}", g, r, 2 if run.quick else 8, 64) for r in repeats}
    for name, dtype in run.cases("cached step", list(found)):
        shape = found[name]
        x = attention.make_inputs(shape, DTYPES[dtype], run.device)
        who = attention.cached_step(x, g // 8, repeats[shape.reference])
        rows = run.contest(who, attention.reference_judge(x), shape.flops, x.moved, dtype)
        if shape.reference == 4 * g and not run.quick:
            run.add_memory("cached_step", shape, dtype, who, rows)
        run.post("cached step", name, shape.words(), dtype, rows)


def local_attention(run: Run) -> None:
    """Reference rows under the window pattern: frames of the preset's size, each sees itself and its neighbours."""
    names = ("tiny",) if run.quick else ("tiny", "wan_1_3b", "tavr_14b")
    for name, dtype in run.cases("local temporal attention", names):
        cfg = preset(name)
        frames = 8 if name == "tiny" else 21 if run.gpu else 4
        size, heads = cfg.tokens_per_frame + bool(cfg.dit.motion_dim), cfg.dit.num_heads
        kept = heads if run.gpu or name == "tiny" else 1
        part = "" if kept == heads else f"of {heads} heads"
        shape = Shape(name, frames * size, 0, kept, cfg.dit.head_dim, part=part)
        x = attention.make_inputs(shape, DTYPES[dtype], run.device)
        who, judge, flops = local(x, frames, 1)
        rows = run.contest(who, judge, flops, x.moved, dtype)
        run.post("local temporal attention", name, f"{shape.words()}, {frames} frames, radius 1", dtype, rows)


def memory_bound(run: Run) -> None:
    """Norms, rotation, modulation: bytes per second against a plain copy's ("% peak" is of that)."""
    frames, copy = 21 if run.gpu else 4, run.ceilings["copy"]
    for name, dtype in run.cases("norm, rope, modulate", ("tiny",) if run.quick else ("wan_1_3b", "tavr_14b")):
        cfg = preset(name)
        n, heads, dim = frames * cfg.tokens_per_frame, cfg.dit.num_heads, cfg.dit.head_dim
        for op, who, judge, (flops, moved) in pieces(n, frames, heads, dim, DTYPES[dtype], run.device):
            rows = run.contest(who, judge, flops, moved, dtype)
            for row in rows:
                if row.pop("of_peak", None) is not None:
                    row["of_copy"] = row["gb_per_s"] * 1e9 / copy
            run.post("norm, rope, modulate", f"{name} {op}", f"{op} L={n} C={heads * dim}", dtype, rows)


# --- scaling ---------------------------------------------------------------------------------------------------------


def growth(run: Run) -> dict[str, Any]:
    """Median time of a step over reference length: ours, torch SDPA, dense; and a straight line through ours."""
    g, heads = (128, 2) if run.quick else (2048, 8)
    steps = (1, 2, 4, 8) if run.quick else (1, 2, 4, 6, 8, 12, 16)
    found = {}
    for _, dtype in run.cases("growth", ("growth",)):
        points = [_growth_point(run, Shape("growth", g, g * n, heads, 64), dtype) for n in steps]
        line = "packed" if all("packed" in p for p in points) else "ours"
        kept = [p for p in points if line in p]
        fit = linear_fit([p["R"] for p in kept], [p[line] for p in kept]) if len(kept) > 1 else None
        found[dtype] = {"G": g, "heads": heads, "head_dim": 64, "points": points, "fit": fit, "fit_of": line}
        if fit:
            said = f"{fit['intercept']:.2f} ms + {1e3 * fit['slope']:.3f} ms per 1000 rows"
            print(f"growth | {dtype} | {line} = {said}, R^2 {fit['r2']:.4f}", flush=True)
    return found


def _growth_point(run: Run, shape: Shape, dtype: str) -> dict[str, float]:
    x, times_g = attention.make_inputs(shape, DTYPES[dtype], run.device), shape.reference // shape.rows
    who = [c for c in attention.forward(x, everybody=False) if not c.coarse]
    if run.quick or run.gpu or times_g in (1, 2, 4, 16):  # dense takes up to half a minute per call and core
        repeats = REPEATS if run.quick or run.gpu or times_g <= 2 else 3 if times_g == 4 else ONCE
        who += [replace(c, kind="other") for c in attention.cached_step(x, shape.rows, repeats) if c.kind == "baseline"]
    rows = run.contest(who, attention.reference_judge(x), shape.flops, x.moved, dtype)
    point = {LINES[r["name"]]: r["median_ms"] for r in rows if "median_ms" in r}
    print(
        f"growth | {dtype} | R={shape.reference} " + "  ".join(f"{k} {v:.2f} ms" for k, v in point.items()), flush=True
    )
    return {"R": shape.reference, **point}


def threads(run: Run) -> dict[str, Any]:
    """One thread against two, in wall time, in turns; tells something only where nothing else runs."""
    found = {}
    for _, dtype in () if run.gpu else run.cases("threads", ("threads",)):
        x = attention.make_inputs(fixed_shapes(run)[0], DTYPES[dtype], run.device)

        def call(n: int, x: Any = x) -> None:
            torch.set_num_threads(n)
            ops.sparse_reference_attention(*x)

        load = os.getloadavg()[0]
        pair = [Contender(str(n), lambda n=n: call(n)) for n in (1, 2)]
        times = interleave(pair, Clock("cpu", 2))
        torch.set_num_threads(run.threads)
        one, two = (summary(times[str(n)])["median_ms"] for n in (1, 2))
        found[dtype] = {"one_ms": one, "two_ms": two, "speedup": one / two, "load": load}
        print(f"threads | {dtype} | 1: {one:.2f} ms, 2: {two:.2f} ms wall, {one / two:.2f}x (load before: {load:.1f})")
    return found
