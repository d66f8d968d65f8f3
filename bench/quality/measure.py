"""What a measure is: its name, unit and which way is better. Every module of measures lists its own as ``MEASURES``."""

from __future__ import annotations

from dataclasses import dataclass

MODULES = ("identity", "sync", "motion", "style", "leakage", "visual", "drift")
"""Modules of measures: each has MEASURES and ``measure(case, video, faces, context) -> dict[str, float]``.

``prepare(case, faces, context) -> dict[str, ndarray]``, where there is one, is run once over each reference; its result
is ``context.facts(case, module)``. ``available() -> str | None``, where there is one, says what the module lacks. Later
modules may read what earlier ones put into ``context.series``.
"""


@dataclass(frozen=True)
class Measure:
    """One column of the results.

    Attributes:
        key: Column name, snake case.
        title: A few words for tables and plots.
        unit: Of the values; "" for a ratio or a correlation.
        better: ``higher``, ``lower``, or ``target``: the nearer to ``target`` the better.
        target: The best value where ``better`` is ``target``.
        group: Table it stands in: identity, sync, motion, style, visual, drift.
    """

    key: str
    title: str
    unit: str
    better: str
    group: str
    target: float = 0.0

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return {"higher": -value, "lower": value}.get(self.better, abs(value - self.target))
