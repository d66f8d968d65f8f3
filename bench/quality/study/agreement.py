"""Whether raters agree, with each other and with themselves, and whose answers are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.quality.study.answers import Answer, Sheet
from bench.quality.study.questions import QUESTIONS, RATING

LIKED = {"left": 1.0, "tie": 0.0, "right": -1.0}


@dataclass(frozen=True)
class Limits:
    """Who is screened out. The defaults are this project's own; a report prints them.

    Attributes:
        correlation: With the mean of the others; a rater goes when even the upper 97.5 % bound (Fisher's z, n the
            trials) is below. Only for ratings: of two videos as good as each other honest raters disagree.
        min_trials: Fewer shared trials say nothing about that.
        repeat_steps: Mean difference between a rating and its repeat, in steps of the scale.
        repeat_share: Share of repeated choices that came out another way, from three repeats on.
        seconds: Per question, between the end of the video and the answer; a share ``fast`` of quicker answers is too
            many, and so is one in less time than the video lasts.
    """

    correlation: float = 0.3
    min_trials: int = 10
    repeat_steps: float = 1.0
    repeat_share: float = 0.5
    seconds: float = 0.25
    fast: float = 0.2


DEFAULTS = Limits()


def numbers(kind: str, answer: Answer) -> np.ndarray:
    """The values of an answer [questions] as numbers: 1..5; +1, 0, -1 for the system first by name; 1 for real."""
    if kind == RATING:
        return np.array([answer.values[q.key] for q in QUESTIONS[kind]], np.float64)
    choice = answer.values["choice"]
    if choice in LIKED:
        turned = 1 if answer.systems == tuple(sorted(answer.systems)) else -1
        return np.array([turned * LIKED[choice]])
    return np.array([float(choice == "real")])


def matrix(kind: str, sheets: Sequence[Sheet]) -> tuple[np.ndarray, list[str]]:
    """(values [raters, trials, questions] with NaN where not asked, trials). Repeats are not in it."""
    trials = sorted({a.trial for s in sheets for a in s.answers})
    place = {trial: i for i, trial in enumerate(trials)}
    values = np.full((len(sheets), len(trials), len(QUESTIONS[kind])), np.nan)
    for i, sheet in enumerate(sheets):
        for a in sheet.answers:
            if not a.repeat:
                values[i, place[a.trial]] = numbers(kind, a)
    return values, trials


def alpha(values: np.ndarray) -> float:
    """Krippendorff's alpha for ordinal values [raters, units] with NaN where not rated.

    From the coincidences of values within units; the distance of two ranks is the squared number of ratings between
    them, half of each end's own. 1 is agreement, 0 is chance; NaN without two ratings of one unit or two values.
    """
    values = values[:, np.isfinite(values).sum(0) > 1]
    levels = np.unique(values[np.isfinite(values)])
    if len(levels) < 2:
        return math.nan
    counts = np.stack([(values == level).sum(0) for level in levels], 1).astype(np.float64)  # [units, levels]
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs[:, range(len(levels)), range(len(levels))] -= counts  # a rating is no pair with itself
    coincidences = (pairs / (counts.sum(1) - 1)[:, None, None]).sum(0)
    of_level = coincidences.sum(1)
    middle = np.cumsum(of_level) - of_level / 2
    distance = (middle[:, None] - middle[None, :]) ** 2
    expected = of_level[:, None] * of_level[None, :]
    return float(1 - (of_level.sum() - 1) * (coincidences * distance).sum() / (expected * distance).sum())


def screen(kind: str, sheets: Sequence[Sheet], limits: Limits = DEFAULTS) -> dict[str, list[str]]:
    """{rater: why their answers are left out}, judged once with everybody among the others."""
    values, _ = matrix(kind, sheets)
    found: dict[str, list[str]] = {}
    for i, sheet in enumerate(sheets):
        reasons = [_repeats(kind, sheet, limits), _haste(kind, sheet, limits)]
        if kind == RATING:
            reasons += [_monotony(values[i]), _outlier(values, i, limits)]
        if told := [reason for reason in reasons if reason]:
            found[sheet.rater] = told
    return found


def _repeats(kind: str, sheet: Sheet, limits: Limits) -> str | None:
    first = {a.trial: numbers(kind, a) for a in sheet.answers if not a.repeat}
    apart = [np.abs(numbers(kind, a) - first[a.trial]) for a in sheet.answers if a.repeat and a.trial in first]
    if kind == RATING and apart and (steps := float(np.mean(apart))) > limits.repeat_steps:
        return f"repeated ratings differ by {steps:.1f} steps on average (limit {limits.repeat_steps:g})"
    changed = sum(bool(d.any()) for d in apart)
    if kind != RATING and len(apart) >= 3 and changed / len(apart) > limits.repeat_share:
        return f"{changed} of {len(apart)} repeated choices came out another way (limit {limits.repeat_share:.0%})"
    return None


def _haste(kind: str, sheet: Sheet, limits: Limits) -> str | None:
    least = limits.seconds * len(QUESTIONS[kind])
    quick = sum(a.deciding < least or a.seconds < 0.9 * a.limit for a in sheet.answers)
    if limits.seconds > 0 and quick / len(sheet.answers) > limits.fast:
        return f"too fast: {quick} of {len(sheet.answers)} answers under {least:.2f} s or before the video's end"
    return None


def _monotony(values: np.ndarray) -> str | None:
    given = values[np.isfinite(values)]
    same = len(given) > 0 and len(np.unique(given)) == 1
    return f"the same answer, {given[0]:.0f}, to everything" if same else None


def _outlier(values: np.ndarray, rater: int, limits: Limits) -> str | None:
    others = np.delete(values, rater, axis=0)
    count = np.isfinite(others).sum(0)
    mean = np.where(count > 0, np.nansum(others, axis=0) / np.maximum(count, 1), np.nan)
    shared = np.isfinite(values[rater]) & np.isfinite(mean)
    trials = int(shared.any(1).sum())
    x, y = values[rater][shared], mean[shared]
    if trials < limits.min_trials or x.std() == 0 or y.std() == 0:
        return None
    r = float(np.corrcoef(x, y)[0, 1])
    bound = math.tanh(math.atanh(min(r, 1 - 1e-12)) + 1.96 / math.sqrt(trials - 3))
    if bound >= limits.correlation:
        return None
    return f"correlation with the others {r:.2f}, at most {bound:.2f} (limit {limits.correlation:g})"
