"""Messages of a live session, version 1: JSON objects with a ``type``, and binary sound and video between them.

The client sends ``session.open`` first, then sound (binary, 16-bit little-endian mono), ``credit``, ``interrupt``,
``audio.end`` and ``session.cancel``. The server sends ``session.opened``, ``media_init`` and ``chunk`` (each followed
by its bytes as one binary message), ``interrupted``, ``error`` and, last of all, ``session.ended``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from avatar_rt.errors import InputError

VERSION = 1


@dataclass(frozen=True)
class Open:
    """``session.open``: which person, and what the sound will be.

    Attributes:
        reference_id: From ``POST /v1/references``.
        sample_rate: Of the sound that comes; 8000 to 48000.
        normalise: Bring the sound to the loudness the model knows. What is played stays as it was sent.
        idle_after: Seconds without sound after which the face goes on with silence; null waits for sound.
        credit: Chunks that may be sent before the client grants more.
    """

    version: int
    reference_id: str
    sample_rate: int = 16_000
    seed: int = 0
    steps: int | None = None
    prompt: str = ""
    normalise: bool = True
    idle_after: float | None = None
    credit: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("version", VERSION, VERSION), ("sample_rate", 8000, 48_000), ("seed", 0, 2**53), ("steps", 1, 1000),
            ("idle_after", 0, 60), ("credit", 1, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                expected = f"{low}" if low == high else f"{low} to {high}"
                raise InputError(f"session.open: {name}: expected {expected}, got {value}")
        if self.sample_rate % 10:
            raise InputError(f"session.open: sample_rate: expected a multiple of 10, got {self.sample_rate}")


@dataclass(frozen=True)
class Credit:
    """``credit``: that many chunks more may be sent."""

    chunks: int

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= 1000:
            raise InputError(f"credit: chunks: expected 1 to 1000, got {self.chunks}")


@dataclass(frozen=True)
class Interrupt:
    """``interrupt``: forget the sound and every chunk not yet sent."""


@dataclass(frozen=True)
class EndAudio:
    """``audio.end``: no more sound; the session ends with what there is."""


@dataclass(frozen=True)
class Cancel:
    """``session.cancel``: end now."""


Message = Open | Credit | Interrupt | EndAudio | Cancel
TYPES: dict[str, type[Message]] = {
    "session.open": Open, "credit": Credit, "interrupt": Interrupt, "audio.end": EndAudio, "session.cancel": Cancel,
}  # fmt: skip
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "str": (str,), "bool": (bool,), "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}  # fmt: skip


def parse(text: str) -> Message:
    """A client's message. Raises InputError on anything that is not one."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("message: expected a JSON object, got something else") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str) or raw["type"] not in TYPES:
        raise InputError(f"message: expected a type among {', '.join(TYPES)}")
    name = raw.pop("type")
    kinds = {f.name: str(f.type) for f in dataclasses.fields(TYPES[name])}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in kinds:
            raise InputError(f"{name}: unknown field {key[:80]!r}, expected {', '.join(kinds) or 'none'}")
        if not isinstance(value, _KINDS[kinds[key]]) or isinstance(value, bool) != (kinds[key] == "bool"):
            raise InputError(
                f"{name}: {key}: expected {kinds[key].replace('None', 'null')}, got {json.dumps(value)[:80]}"
            )
        values[key] = value
    try:
        return TYPES[name](**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(TYPES[name]) if f.default is dataclasses.MISSING]
        raise InputError(f"{name}: expected {', '.join(missing)}") from None
