"""The curriculum's results as a page: what was run, what it scores, and whether each stage shows its effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.quality.statistics import wilson

PAGE = "docs/curriculum.md"
HEAD = """# What each stage is for

Written by `python -m bench.curriculum --write` from `bench/results/curriculum.json`. A stage is trained from the
weights of the one before it; an ablation is the same stage with one thing taken away. Each makes the videos of the same
rendered people whom no training saw, with only what its model was trained with: `t2v` gets a caption, `a2v` speech and
a picture of the person, `personality` speech, a place and a reference of another scene. `tiny` is the shipped weights,
which stage 3 trained for longer with all conditions at once (`personality.together`), `tiny.no_reference` the same
weights with nobody to refer to, and `tiny.alone` the same with a reference but without the sampler's `likeness`, which
puts the reference's own frames into the estimate and what the codec lost of them back into the pictures: what `tiny`
shows of a face is mostly that, and how it moves is the model's. `bench.quality` scores them; `n/a` is what could not be
measured. The flow error is the mean square of the predicted velocity's error on held-out people, at three times, whole
chunks. The losses on decoded faces look through the motion encoder that also reads the mouth opening here; LSE-C* and
the offset are of a network that no loss knows. What is read of a style is partly the face's (`bench/quality/style.py`):
`a2v`, which is shown a picture and nothing of how anybody moves, is above one half in it too, so take a rank for a
style with that in mind. The sampler's settings of `tiny` were chosen on up to thirty-six other people (`python
-m training.data.cases --first 36`), but for the motion's temperature, chosen on twelve of these; how a person is cut
out was looked at on both. A column or a row of an earlier commit was made with that commit's sampler. Of the
similarities over the reference's length, the mean face's is the cosine of the mean embeddings of video and reference;
that of the frames falls where a face does more, as it does with a longer reference (`bench/quality/identity.py`).
"""
MEASURES = (
    ("identity_top1", "its own reference is the nearest"), ("identity", "face similarity"), ("lse_c_star", "LSE-C*"),
    ("offset_within_2", "offset within 2 frames"), ("mouth_r", "mouth opening, r"),
    ("style_top1", "style finds its own"), ("style_auc", "others further in style, share"),
    ("style_distance", "style distance"), ("background_leak", "background leak"),
    ("sharpness", "sharpness"),
    ("flicker", "flicker"), ("motion_energy", "motion energy"), ("loop_r", "generated motion against seen, r"),
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What a stage should show.

    Attributes:
        text: In a few words.
        of, beside: The leg, and the ablation it is held against, if any.
        value: Of a leg's entry; None where it is not there.
        bar: In words.
        met: Of the two values.
    """

    text: str
    of: str
    beside: str | None
    value: Callable[[dict[str, Any]], float | None]
    bar: str
    met: Callable[[float, float | None, int], bool]


def quality(key: str) -> Callable[[dict[str, Any]], float | None]:
    """The value of a measure in a leg's entry."""

    def value(entry: dict[str, Any]) -> float | None:
        found = entry.get("quality", {})
        number = found.get(key, found.get("mean", {}).get(key))
        return None if number is None or math.isnan(number) else float(number)

    return value


def flow(entry: dict[str, Any]) -> float | None:
    """The last held-out flow error."""
    return entry.get("validation", {}).get("flow")


def _less(value: float, other: float | None, cases: int) -> bool:
    return other is not None and value < other


def _more(value: float, other: float | None, cases: int) -> bool:
    return other is not None and value > other


def _above_chance(value: float, other: float | None, cases: int) -> bool:
    """Whether a retrieval's lower bound (Wilson, 95 %) is above one in as many as there are cases."""
    return wilson(round(value * cases), cases)[0] > 1 / max(cases, 1)


def _ranks_above_chance(value: float, other: float | None, cases: int) -> bool:
    """Whether a mean of so many ranks, each uniform in 0..1 by chance, is above one half at 95 % (two-sided)."""
    return value > 0.5 + 1.96 * math.sqrt(1 / (12 * max(cases, 1)))


def _at_least(least: float) -> Callable[[float, float | None, int], bool]:
    return lambda value, other, cases: value >= least


CLAIMS = (
    Claim("stage 1, small first: flow error at as many tokens", "t2v", "t2v.scratch", flow, "lower", _less),
    Claim("stage 1 pays for stage 2: flow error at as many tokens", "a2v", "a2v.scratch", flow, "lower", _less),
    Claim("stage 2 hears: sound found within 2 frames", "a2v", "a2v.no_audio", quality("offset_within_2"),
          "at least 0.8", _at_least(0.8)),
    Claim("stage 2 hears: LSE-C*", "a2v", "a2v.no_audio", quality("lse_c_star"), "higher", _more),
    Claim("stage 2 hears: mouth opening, r", "a2v", "a2v.no_audio", quality("mouth_r"), "higher", _more),
    *(claim for leg in ("personality", "tiny") for claim in (
        Claim(f"stage 3 knows who, {leg}: top-1", leg, f"{leg}.no_reference", quality("identity_top1"),
              "at least 0.9", _at_least(0.9)),
        Claim(f"stage 3 knows how, {leg}: style finds its own", leg, f"{leg}.no_reference", quality("style_top1"),
              "above chance", _above_chance),
        Claim(f"stage 3 knows how, {leg}: others further in style", leg, f"{leg}.no_reference", quality("style_auc"),
              "above chance", _ranks_above_chance),
        Claim(f"motion stream, {leg}: generated motion is seen", leg, None, quality("loop_r"), "at least 0.7",
              _at_least(0.7)),
    )),
    Claim("another scene as reference: leak of its background", "personality.alone", "personality.same_scene",
          lambda e: None if quality("background_leak")(e) is None else abs(quality("background_leak")(e) or 0.0),
          "lower", _less),
    Claim("motion stream: mouth opening, r", "personality.alone", "personality.no_motion", quality("mouth_r"),
          "higher", _more),
    Claim("losses on decoded faces: face similarity", "personality.alone", "personality.no_auxiliary",
          quality("identity"), "higher", _more),
    Claim("the reference by training alone: face similarity", "personality.alone", "personality.no_reference",
          quality("identity"), "higher", _more),
)  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """The whole page from the stored results."""
    legs, machine = document["legs"], document["machine"]
    counts = sorted({len(e["quality"]["cases"]) for e in legs.values() if "quality" in e})
    cases = " or ".join(map(str, counts)) or "no"
    lines = [HEAD, f"{cases} cases; {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}.", ""]
    lines += ["## What each stage shows", "", *claims(legs), "", "## Runs", "", *runs(legs)]
    if any("quality" in e for e in legs.values()):
        lines += ["", "## Scores", "", *scores(legs)]
    if any("seconds" in e for e in legs.values()):
        lines += ["", "## Length of the reference", "", *lengths(legs)]
    return "\n".join(lines) + "\n"


def claims(legs: dict[str, Any]) -> list[str]:
    """One row a claim: with, without, bar, and whether it is met."""
    rows = [["effect", "with", "its ablation", "without", "bar", "met"]]
    for claim in CLAIMS:
        value = claim.value(legs.get(claim.of, {}))
        other = None if claim.beside is None else claim.value(legs.get(claim.beside, {}))
        count = len(legs.get(claim.of, {}).get("quality", {}).get("cases", ()))
        known = value is not None and (other is not None or claim.bar not in ("lower", "higher"))
        verdict = "not measured" if not known or value is None else "yes" if claim.met(value, other, count) else "no"
        rows.append(
            [claim.text, number(value), claim.beside or "", number(other) if claim.beside else "", claim.bar, verdict]
        )
    return table(rows)


def runs(legs: dict[str, Any]) -> list[str]:
    """One row a leg: how much was trained, and how wrong it is with right and wrong conditions."""
    rows = [["run", "steps", "million tokens", "CPU minutes", "flow error", "wrong speech", "wrong reference"]]
    for name, entry in legs.items():
        if "steps" not in entry:
            continue
        found = entry.get("validation", {})
        rows.append([name, str(entry["steps"]), number(entry["tokens"] / 1e6), number(entry["cpu_minutes"]),
                     *(number(found.get(k)) for k in ("flow", "wrong_audio", "wrong_ref"))])  # fmt: skip
    return table(rows)


def scores(legs: dict[str, Any]) -> list[str]:
    """One row a measure, one column a leg; last how many cases were scored at all."""
    names = [n for n, e in legs.items() if "quality" in e]
    rows = [["measure", *names]]
    rows += [[title, *(number(quality(key)(legs[n])) for n in names)] for key, title in MEASURES]
    rows.append(["scored", *(f"{legs[n]['quality']['scored']} of {len(legs[n]['quality']['cases'])}" for n in names)])
    rows.append(["at commit", *(legs[n]["quality"].get("commit", "n/a") for n in names)])
    return table(rows)


def lengths(legs: dict[str, Any]) -> list[str]:
    """What depends on the reference's seconds, and whether longer is never worse for whose face it is."""
    keys = ("identity_top1", "identity_template", "identity", "identity_margin", "mouth_r", "loop_r", "style_distance",
            "lse_c_star")  # fmt: skip
    rows, said = [["run", "seconds", "its own reference is the nearest", "mean face to all of the reference's",
                   "frames to all of the reference", "frames over the nearest other", "mouth opening, r",
                   "generated motion against seen, r", "style distance", "LSE-C*", "at commit"]], []  # fmt: skip
    for name, entry in legs.items():
        found = entry.get("seconds", {})
        curves = [[quality(k)({"quality": q}) for k in keys] for q in found.values()]
        for (length, scored), values in zip(found.items(), curves, strict=True):
            rows.append([name, length, *(number(v, 4) for v in values), scored.get("commit", "n/a")])
        for column, title in enumerate(rows[0][2:6]):
            values = [curve[column] for curve in curves]
            if values and None not in values:
                rising = all(a <= b for a, b in pairwise(values))  # type: ignore[operator]
                verdict = "never worse" if rising else "not always better"
                said += ["", f"{name}, {title}: longer references are {verdict}."]
    return [*table(rows), *said]


def number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}g}"


def table(rows: list[list[str]]) -> list[str]:
    """Rows, the first of them the head, as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
