"""Reading a JSON file that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avatar_rt.errors import InputError


def read_json(path: Path, expected: str) -> Any:
    """What the file holds. Raises: InputError, naming what was ``expected``, where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected {expected}, and it cannot be read ({e})") from None
