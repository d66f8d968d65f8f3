"""Cost growth over reference length as a picture: ``python -m bench.plot`` draws bench/results/ops-growth.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from avatar_rt.errors import UnsupportedError
from bench.report import RESULTS, ops_results

LINES = {
    "dense": ("torch SDPA, dense over everything", "tab:red", "s"),
    "sdpa": ("torch SDPA, target rows over concatenated K/V", "tab:orange", "^"),
    "ours": ("avatar_rt, cached reference", "tab:blue", "o"),
    "packed": ("avatar_rt, cached and packed reference", "tab:green", "v"),
}


def _pyplot() -> Any:
    """matplotlib, drawing to files only. Raises: UnsupportedError when it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("plot: matplotlib is not installed: pip install -e '.[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(source: Path, target: Path | None = None) -> Path | None:
    """Draws the growth part of a stored document; None when it has none."""
    document = json.loads(source.read_text())["result"]
    if target is None:
        target = RESULTS / ("ops-growth.png" if document["machine"]["device"] == "cpu" else "ops-growth-gpu.png")
    growth = document["growth"]
    if not growth:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(growth), figsize=(5.4 * len(growth), 3.8), squeeze=False)
    for axis, (dtype, data) in zip(axes[0], growth.items(), strict=True):
        for key, (label, colour, marker) in LINES.items():
            points = [(p["R"], p[key]) for p in data["points"] if key in p]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=1.5)
        fit = f", {data['fit_of']} fits a line with R² = {data['fit']['r2']:.4f}" if data["fit"] else ""
        axis.set(xscale="log", yscale="log", xlabel="reference rows R", ylabel="ms per step")
        axis.minorticks_off()
        axis.set_xticks([p["R"] for p in data["points"]], [f"{p['R']:,}" for p in data["points"]], fontsize=8)
        axis.set_title(f"{dtype}, G={data['G']}, {data['heads']} heads, d={data['head_dim']}{fit}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    machine = document["machine"]
    threads = "" if machine["device"] != "cpu" else f", {document['threads']} thread(s)"
    figure.suptitle(f"{machine['name']}{threads}, {document['clock']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return target


def main() -> int:
    found = ops_results()
    if not found:
        print("error: bench/results has no ops-*.json: run python -m bench.ops --store", file=sys.stderr)
        return 2
    try:
        for path in found:
            print(draw(path))
    except UnsupportedError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
