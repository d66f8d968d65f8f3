"""From answers to figures: mean opinions, win rates, strengths, shares taken for real; each with its interval.

Raters and cases are both samples: intervals come from drawing raters and cases anew, independently (a two-way
bootstrap), save those of Wilson, which count votes.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt.errors import InputError, UnsupportedError
from bench.quality import pages, plots
from bench.quality.statistics import sign_test, wilson
from bench.quality.study.agreement import DEFAULTS, Limits, alpha, matrix, numbers, screen
from bench.quality.study.answers import Sheet, read_key, read_sheets
from bench.quality.study.questions import PAIRWISE, QUESTIONS, RATING, REAL

DRAWS, STRENGTH_DRAWS = 10_000, 500
MIN_RATERS = 3  # per trial; fewer are told
REGULARISER = 0.01  # of Bradley-Terry: keeps a system that always wins finite
TEMPLATES = Path(__file__).parent / "templates"


def weights(raters: int, cases: int, draws: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each rater [draws, raters] and each case [draws, cases] is drawn."""
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(raters, np.full(raters, 1 / raters), draws).astype(np.float64),
        rng.multinomial(cases, np.full(cases, 1 / cases), draws).astype(np.float64),
    )


def drawn_means(values: np.ndarray, of_raters: np.ndarray, of_cases: np.ndarray) -> np.ndarray:
    """Mean of values [raters, cases], NaN where not rated, in each draw: [draws]; NaN where a draw has no value."""
    known = np.isfinite(values)
    total = ((of_raters @ np.where(known, values, 0.0)) * of_cases).sum(1)
    count = ((of_raters @ known.astype(np.float64)) * of_cases).sum(1)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def bounds(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws [draws]; NaNs without any."""
    known = drawn[np.isfinite(drawn)]
    return tuple(map(float, np.quantile(known, (0.025, 0.975)))) if len(known) else (math.nan, math.nan)


def by_case(kind: str, sheets: Sequence[Sheet], systems: tuple[str, ...], cases: Sequence[str]) -> np.ndarray:
    """First answers about ``systems`` (one, or a pair by name) as numbers: [raters, cases, questions]."""
    values = np.full((len(sheets), len(cases), len(QUESTIONS[kind])), np.nan)
    for i, sheet in enumerate(sheets):
        for a in sheet.answers:
            if not a.repeat and tuple(sorted(a.systems)) == systems:
                values[i, cases.index(a.case)] = numbers(kind, a)
    return values


def ratings(sheets: Sequence[Sheet], systems: Sequence[str], cases: Sequence[str], hidden: str) -> dict[str, Any]:
    """Per dimension: mean opinion of each system, its distance to the true videos, and the raters' agreement."""
    drawn_by = weights(len(sheets), len(cases), DRAWS)
    values = {s: by_case(RATING, sheets, (s,), cases) for s in systems}
    everything, _ = matrix(RATING, sheets)
    found = {}
    for k, q in enumerate(QUESTIONS[RATING]):
        draws = {s: drawn_means(values[s][..., k], *drawn_by) for s in systems}
        of = {}
        for s in systems:
            given = values[s][..., k][np.isfinite(values[s][..., k])]
            low, high = bounds(draws[s])
            below = bounds(draws[s] - draws[hidden]) if s != hidden and hidden in draws else (math.nan, math.nan)
            of[s] = {
                "mos": float(given.mean()) if len(given) else math.nan, "low": low, "high": high, "n": len(given),
                "below_truth": below,
            }  # fmt: skip
        found[q.key] = {"title": q.title, "systems": of, "alpha": alpha(everything[..., k])}
    return found


def preferences(sheets: Sequence[Sheet], systems: Sequence[str], cases: Sequence[str]) -> dict[str, Any]:
    """Per pair: cases won by the majority of raters, ties, Wilson's interval and the sign test; then strengths."""
    pairs = []
    votes = {}
    for a, b in itertools.combinations(sorted(systems), 2):
        v = votes[a, b] = by_case(PAIRWISE, sheets, (a, b), cases)[..., 0]
        asked = np.isfinite(v).any(0)
        for_a, for_b = (v == 1).sum(0), (v == -1).sum(0)
        won, lost = int((for_a > for_b).sum()), int((for_b > for_a).sum())
        low, high = wilson(won, won + lost)
        pairs.append({
            "a": a, "b": b, "cases": int(asked.sum()), "won": won, "lost": lost,
            "tied": int((asked & (for_a == for_b)).sum()), "rate": won / (won + lost) if won + lost else math.nan,
            "low": low, "high": high, "p": sign_test(won, lost), "votes_a": int(for_a.sum()),
            "votes_b": int(for_b.sum()), "votes_tied": int((v == 0).sum()),
        })  # fmt: skip
    everything, trials = matrix(PAIRWISE, sheets)
    # Alpha takes chance from the values' frequencies, so which of a pair counts as +1 must not follow the systems.
    sides = np.array([1 - 2 * (zlib.crc32(trial.encode()) & 1) for trial in trials])
    strengths = bradley_terry(votes, sorted(systems), len(sheets), len(cases))
    return {"pairs": pairs, "strengths": strengths, "alpha": alpha(everything[..., 0] * sides)}


def bradley_terry(
    votes: Mapping[tuple[str, str], np.ndarray], systems: Sequence[str], raters: int, cases: int
) -> dict[str, dict[str, float]]:
    """Log strengths with mean zero; a tie is half a win for each.

    Args:
        votes: {(a, b): [raters, cases]}, +1 where a won, -1 where b, 0 for a tie, NaN where not asked.

    Raises: UnsupportedError when choix is not there.
    """
    try:
        import choix
    except ImportError:
        raise UnsupportedError("Bradley-Terry: choix is not installed: pip install -e '.[bench]'") from None
    place = {s: i for i, s in enumerate(systems)}
    of_raters, of_cases = weights(raters, cases, STRENGTH_DRAWS)
    of_raters, of_cases = (np.vstack([np.ones((1, w.shape[1])), w]) for w in (of_raters, of_cases))  # draw 0: as it is
    wins = np.zeros((len(of_raters), len(systems), len(systems)))
    for (a, b), v in votes.items():
        for winner, loser, sign in ((a, b, 1), (b, a, -1)):
            share = (v == sign) + 0.5 * (v == 0)
            wins[:, place[winner], place[loser]] += ((of_raters @ share) * of_cases).sum(1)
    strengths = np.array([choix.ilsr_pairwise_dense(w, alpha=REGULARISER) for w in wins])
    strengths -= strengths.mean(1, keepdims=True)
    found = {}
    for s, i in place.items():
        low, high = bounds(strengths[1:, i])
        found[s] = {"strength": float(strengths[0, i]), "low": low, "high": high}
    return found


def taken_for_real(sheets: Sequence[Sheet], systems: Sequence[str], cases: Sequence[str]) -> dict[str, Any]:
    """Per system: the share of votes that took it for real, with Wilson's interval and that of the two-way draws."""
    drawn_by = weights(len(sheets), len(cases), DRAWS)
    everything, _ = matrix(REAL, sheets)
    found = {}
    for s in systems:
        v = by_case(REAL, sheets, (s,), cases)[..., 0]
        real, asked = int((v == 1).sum()), int(np.isfinite(v).sum())
        low, high = wilson(real, asked)
        drawn_low, drawn_high = bounds(drawn_means(v, *drawn_by))
        found[s] = {
            "share": real / asked if asked else math.nan, "real": real, "asked": asked, "low": low, "high": high,
            "drawn_low": drawn_low, "drawn_high": drawn_high, "p": sign_test(real, asked - real),
        }  # fmt: skip
    return {"systems": found, "alpha": alpha(everything[..., 0])}


def study_of(key: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(systems, the hidden reference first; cases) of a key."""
    systems = sorted({item["system"] for item in key["items"].values()}, key=lambda s: (s != key["hidden"], s))
    return systems, sorted({item["case"] for item in key["items"].values()})


def results(sheets: Sequence[Sheet], key: Mapping[str, Any], limits: Limits = DEFAULTS) -> dict[str, Any]:
    """Everything that is said of a study, as one document. Raises: InputError when no rater is left."""
    kind = key["kind"]
    screened = screen(kind, sheets, limits)
    kept = [s for s in sheets if s.rater not in screened]
    if not kept:
        told = "; ".join(f"{rater}: {', '.join(why)}" for rater, why in screened.items()) or "there were none"
        raise InputError(f"expected at least one rater after screening, got none ({told})")
    systems, cases = study_of(key)
    values, _ = matrix(kind, kept)
    per_trial = np.isfinite(values).any(2).sum(0)
    result: dict[str, Any] = {
        "study": key["study"], "kind": kind, "hidden": key["hidden"], "systems": systems, "cases": len(cases),
        "raters": len(kept), "simulated": sum(s.simulated for s in kept), "screened": screened,
        "limits": dict(limits.__dict__), "left_out": key["left_out"],
        "unfinished": {s.rater: f"{len(s.answers)} of {s.asked} trials" for s in kept if len(s.answers) < s.asked},
        "answers": sum(len(s.answers) for s in kept), "trials": len(key["trials"]),
        "thin_trials": len(key["trials"]) - int((per_trial >= MIN_RATERS).sum()),
    }  # fmt: skip
    if kind == RATING:
        return result | {"results": ratings(kept, systems, cases, key["hidden"])}
    if kind == PAIRWISE:
        return result | {"results": preferences(kept, systems, cases)}
    return result | {"results": taken_for_real(kept, systems, cases)}


def write_results(folder: Path, key_path: Path, out: Path, limits: Limits = DEFAULTS) -> dict[str, Any]:
    """Reads answers, writes ``out/index.html`` and ``out/results.json`` and gives the document of the last line."""
    key = read_key(key_path)
    sheets, problems = read_sheets(folder, key)
    if not sheets:
        raise InputError(
            f"{folder}: expected at least one usable file of answers, got none ({'; '.join(problems[:3])})"
        )
    result = results(sheets, key, limits) | {"unusable": problems}
    drawing = None
    if result["kind"] == RATING:
        titles = [d["title"] for d in result["results"].values()]
        points = {
            s: [tuple(d["systems"][s][k] for k in ("mos", "low", "high")) for d in result["results"].values()]
            for s in result["systems"]
        }
        drawing = plots.radar("radar", titles, points)
    out.mkdir(parents=True, exist_ok=True)
    colours = {s: plots.colour(i) for i, s in enumerate(result["systems"])}
    page = pages.render(
        "results.html", TEMPLATES, r=result, drawing=drawing, colours=colours, title=key["title"], floor=MIN_RATERS
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    document = pages.plain(result | {"page": str(out / "index.html")})
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
