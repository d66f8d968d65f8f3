"""What the degraded systems must do to the measures, given as data, and whether they did.

A list in JSON; each entry says that ``measure`` must find ``worse`` worse than ``better``::

    [{"measure": "sharpness", "better": "truth", "worse": "blurred", "why": "a blur takes the fine detail"}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avatar_rt.errors import InputError
from bench.quality.documents import read_json
from bench.quality.measure import Measure
from bench.quality.statistics import MIN_CASES, Comparison, compare, systems_of

FIELDS = ("measure", "better", "worse", "why")


@dataclass(frozen=True)
class Expectation:
    """``measure`` (its key) must find the system ``worse`` worse than ``better``, because of ``why``."""

    measure: str
    better: str
    worse: str
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """``verdict`` is ``pass``, ``fail`` or ``not checked``; ``reason`` says why it is not a pass."""

    expectation: Expectation
    verdict: str
    reason: str = ""
    comparison: Comparison | None = None


def read_expectations(path: Path) -> list[Expectation]:
    """Raises: InputError on a file that is no list of such entries."""
    found = read_json(path, "a list of expectations in JSON")
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of expectations, got {type(found).__name__}")
    for i, entry in enumerate(found):
        right = isinstance(entry, dict) and set(entry) <= set(FIELDS) and set(FIELDS[:3]) <= set(entry)
        if not right or not all(isinstance(v, str) for v in entry.values()):
            raise InputError(f"{path}: expected texts named {', '.join(FIELDS)} in entry {i}, got {json.dumps(entry)}")
    return [Expectation(**entry) for entry in found]


def check(rows: Sequence[Mapping], measures: Sequence[Measure], expectations: Sequence[Expectation]) -> list[Outcome]:
    """One outcome each: it passes where the interval of the paired difference lies on the expected side of zero."""
    known, systems = {m.key: m for m in measures}, systems_of(rows)
    outcomes = []
    for e in expectations:
        absent = [s for s in (e.better, e.worse) if s not in systems]
        if e.measure not in known:
            outcomes.append(Outcome(e, "not checked", f"there is no measure {e.measure}"))
        elif absent:
            outcomes.append(Outcome(e, "not checked", f"there are no rows of {' and '.join(absent)}"))
        else:
            outcomes.append(_outcome(e, compare(rows, [known[e.measure]], e.better, e.worse)[0]))
    return outcomes


def _outcome(e: Expectation, c: Comparison) -> Outcome:
    if len(c.cases) < MIN_CASES:
        return Outcome(e, "not checked", f"expected at least {MIN_CASES} cases that both have, got {len(c.cases)}", c)
    if c.low > 0:
        return Outcome(e, "pass", "", c)
    told = "finds the opposite" if c.high < 0 else "does not tell them apart"
    return Outcome(e, "fail", f"{e.measure} {told}", c)
