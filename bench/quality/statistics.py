"""Numbers over the table of results: trimmed means with intervals, two systems compared, and who is missing.

The table is a list of rows, one per (system, case)::

    {"system": "tiny", "case": "case-07", "status": "ok", "reason": "", "face_similarity": 0.61, ...}

A case counts for a measure only where its row says ``ok`` and the value is a number. Every other case of the table is a
failure with a name: it stays in the N that the n is printed over, and it is listed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from avatar_rt.errors import InputError
from bench.quality.measure import Measure

NAMES = ("system", "case", "status", "reason")
TRIM = 0.1  # of the sorted values, cut at each end
DRAWS = 10_000
LEVEL = 0.95
ALPHA = 0.05
MIN_CASES = 6  # with fewer pairs the exact two-sided signed-rank test cannot go below 5 %
NOT_MEASURED, NO_ROW = "not measured", "no row"


@dataclass(frozen=True)
class Failure:
    """A case that a measure of a system has no value for."""

    case: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """One measure of one system.

    Attributes:
        mean, low, high: ``centre`` and its bootstrap interval, in the measure's unit; NaN without a value.
        values: {case: value} of the cases that count.
        failures: The others. ``len(values) + len(failures)`` is the number of cases.
    """

    measure: Measure
    system: str
    mean: float
    low: float
    high: float
    values: dict[str, float]
    failures: tuple[Failure, ...]

    @property
    def scored(self) -> str:
        return f"{len(self.values)} of {len(self.values) + len(self.failures)}"


@dataclass(frozen=True)
class Comparison:
    """Two systems in one measure, on the cases that both have.

    Attributes:
        mean_a, mean_b: ``centre`` over the shared cases.
        gain, low, high: ``centre`` over cases of cost(b) - cost(a) and its interval: above zero, a is better.
        won, tied, lost: Cases where a is better, equal, worse.
        p: Two-sided Wilcoxon signed-rank test of the gains; ``p_holm`` after Holm over the measures of its group.
        only_a, only_b: Cases that one system alone has.
        verdict: ``better`` or ``worse`` (of a; p_holm under 5 % and an interval on one side of zero),
            ``no difference shown``, or ``too few cases``.
    """

    measure: Measure
    a: str
    b: str
    cases: tuple[str, ...]
    mean_a: float
    mean_b: float
    gain: float
    low: float
    high: float
    won: int
    tied: int
    lost: int
    p: float
    p_holm: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    verdict: str


def read_rows(path: Path) -> list[dict]:
    """The table from its CSV; an empty field is NaN.

    Raises: InputError on a file that is no such table, a field that is no number, or two rows of one system and case.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            rows = [_typed(row, f"{path}:{reader.line_num}") for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: expected a table of results, and it cannot be read ({e})") from None
    if missing := [name for name in NAMES if name not in columns]:
        raise InputError(f"{path}: expected the columns {', '.join(NAMES)}, and {', '.join(missing)} is not there")
    check_rows(rows, str(path))
    return rows


def _typed(row: dict, where: str) -> dict:
    if "" in row:
        raise InputError(f"{where}: expected as many fields as the first line has, got {len(row[''])} more")
    typed: dict = {}
    for key, text in row.items():
        if key in NAMES:
            typed[key] = text
            continue
        try:
            typed[key] = float(text) if text.strip() else math.nan
        except ValueError:
            raise InputError(f"{where}: expected a number in the column {key}, got {text!r}") from None
    return typed


def check_rows(rows: Sequence[Mapping], where: str = "rows") -> None:
    """Raises: InputError on an empty table, a row without a name, or two rows of one system and case."""
    if not rows:
        raise InputError(f"{where}: expected at least one row, got none")
    seen = set()
    for row in rows:
        name = (row["system"], row["case"])
        if not all(name):
            raise InputError(f"{where}: expected a system and a case in every row, got {name}")
        if name in seen:
            raise InputError(f"{where}: expected one row per system and case, got two of {name[0]}, {name[1]}")
        seen.add(name)


def systems_of(rows: Iterable[Mapping]) -> list[str]:
    """Systems in the table's order."""
    return list(dict.fromkeys(row["system"] for row in rows))


def cases_of(rows: Iterable[Mapping]) -> list[str]:
    """All cases that any system has a row for, sorted."""
    return sorted({row["case"] for row in rows})


def trimmed_mean(values: np.ndarray | Sequence[float]) -> float:
    """Mean without the lowest and the highest 10 % of values [n] (``scipy.stats.trim_mean``); NaN for none."""
    return float(stats.trim_mean(np.asarray(values, np.float64), TRIM)) if len(values) else math.nan


def centre(values: np.ndarray | Sequence[float]) -> float:
    """The trimmed mean; of yes and no per case (0 and 1, and their differences) the plain share.

    Trimming 36 such cases would cut the three that failed and call it 100 %.
    """
    x = np.asarray(values, np.float64)
    return float(x.mean()) if len(x) and _is_share(x) else trimmed_mean(x)


def _is_share(x: np.ndarray) -> bool:
    return bool(np.isin(x, (-1, 0, 1)).all())


def interval(values: np.ndarray | Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval, 95 %, of ``centre`` of values [n]; NaNs for fewer than two values."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return math.nan, math.nan
    drawn = x[np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))]
    means = drawn.mean(1) if _is_share(x) else stats.trim_mean(drawn, TRIM, axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def split(
    rows: Sequence[Mapping], measure: Measure, system: str, cases: Sequence[str]
) -> tuple[dict[str, float], tuple[Failure, ...]]:
    """({case: value}, failures) of one measure of one system over ``cases``; each case is in one of the two."""
    of_case = {row["case"]: row for row in rows if row["system"] == system}
    values, failures = {}, []
    for case in cases:
        row = of_case.get(case)
        if row is None:
            failures.append(Failure(case, NO_ROW))
        elif row["status"] != "ok":
            failures.append(Failure(case, row["status"] or "no status", row.get("reason") or ""))
        elif not math.isfinite(value := float(row.get(measure.key, math.nan))):
            failures.append(Failure(case, NOT_MEASURED, row.get("reason") or ""))
        else:
            values[case] = value
    return values, tuple(failures)


def summarise(
    rows: Sequence[Mapping], measure: Measure, system: str, cases: Sequence[str] | None = None, draws: int = DRAWS
) -> Summary:
    """One measure of one system over ``cases``, by default all cases of the table."""
    values, failures = split(rows, measure, system, cases_of(rows) if cases is None else cases)
    numbers = list(values.values())
    return Summary(measure, system, centre(numbers), *interval(numbers, draws), values, failures)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values; NaN stays NaN and is not counted among the tests."""
    adjusted = [math.nan] * len(p)
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def wilcoxon(gains: np.ndarray | Sequence[float]) -> float:
    """Two-sided p of the signed-rank test of gains [n], zeros left out; 1 when all are zero, NaN for none."""
    x = np.asarray(gains, np.float64)
    if not len(x):
        return math.nan
    return float(stats.wilcoxon(x[x != 0]).pvalue) if np.any(x != 0) else 1.0


def compare(
    rows: Sequence[Mapping], measures: Sequence[Measure], a: str, b: str, draws: int = DRAWS
) -> list[Comparison]:
    """Two systems in every measure that has a direction; Holm's adjustment runs over the measures of a group."""
    found = [_compare(rows, measure, a, b, draws) for measure in measures]
    for group in dict.fromkeys(m.group for m in measures):
        family = [i for i, c in enumerate(found) if c.measure.group == group]
        for i, p in zip(family, holm([found[i].p for i in family]), strict=True):
            found[i] = _judged(found[i], p)
    return found


def _compare(rows: Sequence[Mapping], measure: Measure, a: str, b: str, draws: int) -> Comparison:
    cases = cases_of(rows)
    of_a, of_b = (split(rows, measure, system, cases)[0] for system in (a, b))
    shared = tuple(case for case in cases if case in of_a and case in of_b)
    x, y = (np.array([values[case] for case in shared]) for values in (of_a, of_b))
    gains = np.array([measure.cost(v) - measure.cost(u) for u, v in zip(x, y)])
    return Comparison(
        measure, a, b, shared, centre(x), centre(y), centre(gains), *interval(gains, draws),
        int((gains > 0).sum()), int((gains == 0).sum()), int((gains < 0).sum()), wilcoxon(gains), math.nan,
        tuple(case for case in of_a if case not in of_b), tuple(case for case in of_b if case not in of_a), "",
    )  # fmt: skip


def _judged(c: Comparison, p_holm: float) -> Comparison:
    if len(c.cases) < MIN_CASES:
        verdict = "too few cases"
    elif p_holm < ALPHA and c.low > 0:
        verdict = "better"
    elif p_holm < ALPHA and c.high < 0:
        verdict = "worse"
    else:
        verdict = "no difference shown"
    return Comparison(**{**c.__dict__, "p_holm": p_holm, "verdict": verdict})


def wilson(successes: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share: 31 of 45 gives 0.54 to 0.80; NaNs without a trial."""
    if trials <= 0:
        return math.nan, math.nan
    z = float(stats.norm.ppf((1 + level) / 2))
    share, grown = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / grown
    half = z / grown * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return 0.0 if not successes else middle - half, 1.0 if successes == trials else middle + half


def sign_test(won: int, lost: int) -> float:
    """Two-sided binomial p that neither side is favoured; ties are left out; 1 without a decided case."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
