"""Answers files: read, held against the schema and the key, and unblinded. A broken file is one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar_rt.errors import InputError
from bench.quality.documents import read_json
from bench.quality.study.questions import KEY, fits

SCHEMA = Path(__file__).parent / "schema.json"
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One trial of one rater: ``systems`` in the order shown; ``limit`` is the seconds that a playthrough takes."""

    trial: str
    case: str
    systems: tuple[str, ...]
    repeat: bool
    values: dict[str, Any]
    seconds: float
    deciding: float
    limit: float


@dataclass(frozen=True)
class Sheet:
    """All answers of one rater; ``asked`` is how many trials they had."""

    rater: str
    simulated: bool
    asked: int
    answers: tuple[Answer, ...]


def read_key(path: Path) -> dict[str, Any]:
    """Raises: InputError on a file that is not the key of a study."""
    key = read_json(path, "the key of a study")
    if not isinstance(key, dict) or key.get("schema") != KEY:
        got = key.get("schema") if isinstance(key, dict) else type(key).__name__
        raise InputError(f"{path}: expected the key of a study, {KEY}, got {got!r}")
    return key


def read_sheets(folder: Path, key: Mapping[str, Any]) -> tuple[list[Sheet], list[str]]:
    """(raters by name, one sentence for each file that is not used). Raises: InputError on a folder without files."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: expected a folder with answers, *.json, got none")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    sheets: dict[str, tuple[Sheet, str]] = {}
    problems = []
    for path in files:
        try:
            sheet = _sheet(_parsed(path), schema, key)
        except ValueError as e:
            problems.append(f"{path.name}: {e}")
            continue
        if sheet.rater in sheets:
            problems.append(f"{path.name}: {sheet.rater} has answered already, in {sheets[sheet.rater][1]}")
        else:
            sheets[sheet.rater] = sheet, path.name
    return [sheets[name][0] for name in sorted(sheets)], problems


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # also bytes that are no text
        raise ValueError(f"expected answers in JSON, and it cannot be read ({e})") from None


def _sheet(data: Any, schema: Mapping[str, Any], key: Mapping[str, Any]) -> Sheet:
    """Raises: ValueError with one sentence."""
    if wrong := mismatch(data, schema):
        raise ValueError(wrong)
    if (data["study"], data["kind"]) != (key["study"], key["kind"]):
        raise ValueError(
            f"expected answers to study {key['study']} ({key['kind']}), got {data['study']} ({data['kind']})"
        )
    answers = tuple(_answer(entry, f"answer {i}", key) for i, entry in enumerate(data["answers"]))
    if not answers:
        raise ValueError("no trial is answered")
    seen = [(a.trial, a.repeat) for a in answers]
    if twice := next((t for t in seen if seen.count(t) > 1), None):
        raise ValueError(f"trial {twice[0]} is answered twice")
    return Sheet(data["rater"], data["simulated"], data["trials"], answers)


def _answer(entry: Mapping[str, Any], where: str, key: Mapping[str, Any]) -> Answer:
    known = key["trials"].get(entry["trial"])
    if known is None:
        raise ValueError(f"{where}: trial {entry['trial']} is not of this study")
    if sorted(entry["videos"]) != sorted(known):
        raise ValueError(f"{where}: expected the videos {', '.join(known)}, got {', '.join(entry['videos'])}")
    if wrong := fits(key["kind"], entry["values"]):
        raise ValueError(f"{where}: {wrong}")
    items = [key["items"][name] for name in entry["videos"]]
    return Answer(
        entry["trial"], items[0]["case"], tuple(i["system"] for i in items), entry["repeat"], dict(entry["values"]),
        float(entry["seconds"]), float(entry["deciding"]), max(i["seconds"] for i in items),
    )  # fmt: skip


def mismatch(value: Any, schema: Mapping[str, Any], where: str = "") -> str | None:
    """None, or one sentence on how a value departs from the part of JSON Schema that ``schema.json`` uses."""
    at = f"{where}: " if where else ""
    if "const" in schema and value != schema["const"]:
        return f"{at}expected {schema['const']}, got {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at}expected one of {', '.join(schema['enum'])}, got {value!r}"
    if (kinds := schema.get("type")) is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        truth = isinstance(value, bool) and "boolean" not in kinds  # to Python a bool is an int
        if truth or not any(isinstance(value, TYPES[kind]) for kind in kinds):
            return f"{at}expected {' or '.join(kinds)}, got {type(value).__name__}"
    if value is not None and "minimum" in schema and not value >= schema["minimum"]:  # also NaN
        return f"{at}expected at least {schema['minimum']}, got {value}"
    if len(value) < schema["minLength"] if "minLength" in schema else False:
        return f"{at}expected a text, got an empty one"
    if isinstance(value, dict):
        return _fields(value, schema, where)
    if isinstance(value, list):
        found = (mismatch(v, schema.get("items", {}), f"{where}[{i}]") for i, v in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    return None


def _fields(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    at = f"{where}: " if where else ""
    if absent := [name for name in schema.get("required", ()) if name not in value]:
        return f"{at}expected {', '.join(absent)}, which is not there"
    known: Mapping[str, Any] = schema.get("properties", {})
    if schema.get("additionalProperties") is False and (extra := sorted(set(value) - set(known))):
        return f"{at}got {', '.join(extra)}, which has no place here"
    inner = f"{where}." if where else ""
    found = (mismatch(value[name], part, inner + name) for name, part in known.items() if name in value)
    return next((wrong for wrong in found if wrong), None)
