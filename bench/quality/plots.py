"""Drawings for the pages: SVG text that takes its ink from the page, so that it follows light and dark."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avatar_rt.errors import UnsupportedError
from bench.quality.statistics import Summary

# Told apart in light and dark, and by people who see fewer colours; the order is that of the systems.
COLOURS = ("#3b82d0", "#e08a1e", "#2f9e77", "#c65b9b", "#8f7ae5", "#b5952a", "#d9534f", "#4aa8b8", "#8a8f98", "#7a9a3a")
INK, FAINT = "#010203", "#040506"  # stand for the page's own colours, see _themed


def _pyplot() -> Any:
    """matplotlib, drawing to files only. Raises: UnsupportedError when it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("plots: matplotlib is not installed: pip install -e '.[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "avatar_rt", "text.parse_math": False,
        "font.size": 10, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
        "grid.color": FAINT, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    return pyplot


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _themed(figure: Any, name: str, described: str) -> str:
    """The figure as SVG for inside a page: its ids prefixed, its black ink the page's ``currentColor``."""
    buffer = io.StringIO()
    tight = {"transparent": True, "bbox_inches": "tight", "pad_inches": 0.05}
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **tight)
    _pyplot().close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#(?!case-of-)', f'href="#{name}-', svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)


def link(case: str) -> str:
    """The id of a case's place in the page."""
    return "case-of-" + re.sub(r"[^A-Za-z0-9_-]", "_", case)


def distributions(name: str, summaries: Sequence[Sequence[Summary]]) -> str:
    """One panel a measure: a dot per case (a link to it), the trimmed mean and its interval, a row per system.

    Args:
        name: Of the figure, for its ids.
        summaries: [measures][systems].
    """
    plt = _pyplot()
    columns = min(3, len(summaries))
    down, systems = math.ceil(len(summaries) / columns), len(summaries[0])
    height = down * (1.0 + 0.25 * systems)
    figure, axes = plt.subplots(
        down, columns, figsize=(3.7 * columns, height), squeeze=False, sharey=True, layout="constrained"
    )
    figure.get_layout_engine().set(wspace=0.08, hspace=0.06)
    for axis, row in zip(axes.flat, summaries):
        _panel(axis, row)
    for axis in axes.flat[len(summaries) :]:
        axis.set_visible(False)
    return _themed(figure, name, f"Values per case of {len(summaries)} measures")


def _panel(axis: Any, row: Sequence[Summary]) -> None:
    for place, s in enumerate(row):
        values = np.array(list(s.values.values()))
        spread = 0.22 * np.sin(2.399963 * np.arange(len(values)))  # golden angle: spreads dots without chance
        if not len(values):
            axis.annotate("no value", (0.5, place), (0.5, place), ("axes fraction", "data"), color=INK, fontsize=8,
                          ha="center", va="center", alpha=0.7)  # fmt: skip
            continue
        dots = axis.scatter(values, place + spread, s=15, color=colour(place), alpha=0.55, linewidths=0)
        dots.set_urls([f"#{link(case)}" for case in s.values])
        if math.isfinite(s.low):
            axis.plot([s.low, s.high], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt", zorder=3)
        axis.plot([s.mean], [place], marker="D", markersize=5, color=INK, markerfacecolor=colour(place), zorder=4)
    measure = row[0].measure
    if measure.better == "target":
        axis.axvline(measure.target, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7)
    way = {"higher": "better →", "lower": "← better", "target": f"best at {measure.target:g}"}[measure.better]
    told = textwrap.fill(measure.title, 40, max_lines=2, placeholder=" …")
    axis.set_title(told, fontsize=9, loc="left")
    axis.set_xlabel(f"{measure.unit}, {way}" if measure.unit else way, fontsize=8)
    axis.set_yticks(range(len(row)), [s.system for s in row])
    axis.set_ylim(len(row) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def radar(name: str, axes_of: Sequence[str], systems: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Mean opinions from 1 at the centre to 5 at the rim: {system: (mean, low, high) per axis}, intervals shaded."""
    plt = _pyplot()
    angles = np.linspace(0, 2 * np.pi, len(axes_of), endpoint=False)
    around = np.append(angles, angles[0])
    figure, axis = plt.subplots(figsize=(8.4, 5.6), subplot_kw={"projection": "polar"}, layout="constrained")
    axis.set_facecolor("none")
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    for place, (system, points) in enumerate(systems.items()):
        mean, low, high = (np.array([p[k] for p in (*points, points[0])]) for k in range(3))
        axis.plot(around, mean, color=colour(place), linewidth=1.8, marker="o", markersize=4, label=system)
        axis.fill_between(around, low, high, color=colour(place), alpha=0.15, linewidth=0)
    axis.set_ylim(1, 5)
    axis.set_yticks([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"], fontsize=8)
    axis.set_xticks(angles, list(axes_of))
    for tick, angle in zip(axis.get_xticklabels(), angles):  # labels stand outside of the rim
        tick.set_horizontalalignment("center" if abs(np.sin(angle)) < 0.1 else "left" if np.sin(angle) > 0 else "right")
    axis.spines["polar"].set_color(FAINT)
    figure.legend(loc="outside right upper", frameon=False)
    return _themed(figure, name, "Mean opinion per dimension")
