"""What a rater is asked, per kind of study; the page and the analysis read the same words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

RATING, PAIRWISE, REAL = KINDS = ("rating", "pairwise", "real_or_generated")
PAGE, KEY, ANSWERS = "avatar_rt.study/1", "avatar_rt.study-key/1", "avatar_rt.study-answers/1"


@dataclass(frozen=True)
class Question:
    """``options`` are (value, words, key to press); ``low`` and ``high`` say what the ends of a scale mean."""

    key: str
    title: str
    text: str
    options: tuple[tuple[int | str, str, str], ...]
    low: str = ""
    high: str = ""


def _scale(key: str, title: str, text: str, low: str, high: str) -> Question:
    return Question(key, title, text, tuple((n, str(n), str(n)) for n in range(1, 6)), low, high)


QUESTIONS: dict[str, tuple[Question, ...]] = {
    RATING: (
        _scale("identity", "Identity", "Is this the person of the reference clip?", "someone else", "surely them"),
        _scale("lip_sync", "Lip sync", "Do the lips fit what is heard?", "not at all", "perfectly"),
        _scale("naturalness", "Motion naturalness", "Do face and head move as a person does?", "unnatural", "natural"),
        _scale("consistency", "Motion consistency", "Is the motion of one manner throughout?", "broken", "steady"),
        _scale("artifacts", "Artifacts", "How disturbing are faults in the picture?", "very disturbing", "none seen"),
        _scale("visual", "Visual quality", "How good is the picture?", "bad", "excellent"),
    ),
    PAIRWISE: (
        Question(
            "choice", "Preference", "Which of the two is the better video of this person speaking?",
            (("left", "left", "ArrowLeft"), ("tie", "no difference", "ArrowDown"), ("right", "right", "ArrowRight")),
        ),
    ),
    REAL: (
        Question(
            "choice", "Real or generated", "Was this recorded, or was it generated?",
            (("real", "real", "ArrowLeft"), ("generated", "generated", "ArrowRight")),
        ),
    ),
}  # fmt: skip

PLAYED_CASES = {
    RATING: "You see one video at a time, beside a reference clip of the same person. Rate it on six scales.",
    PAIRWISE: "You see two videos of the same words, and a reference clip of the person. Say which one you prefer.",
    REAL: "You see one video at a time. Say whether it was recorded or generated.",
}


def asked(kind: str) -> list[dict[str, Any]]:
    """The questions of a kind, for the page."""
    return [asdict(q) for q in QUESTIONS[kind]]


def fits(kind: str, values: dict[str, Any]) -> str | None:
    """None, or what is wrong with the values of one answer."""
    for q in QUESTIONS[kind]:
        allowed = [o[0] for o in q.options]
        if q.key not in values:
            return f"no answer to {q.key}"
        if isinstance(values[q.key], bool) or values[q.key] not in allowed:
            return f"{q.key}: expected one of {', '.join(map(str, allowed))}, got {values[q.key]!r}"
    extra = set(values) - {q.key for q in QUESTIONS[kind]}
    return f"answers to {', '.join(sorted(extra))}, which was not asked" if extra else None
