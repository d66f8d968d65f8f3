"""Pages from templates: everything is escaped, nothing is fetched, and they open from the disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from avatar_rt.errors import UnsupportedError

TEMPLATES = Path(__file__).parent / "templates"


def number(value: float | None, signed: bool = False) -> str:
    """Three significant digits, an en dash for what has no value."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or size == 0 else 3
    text = f"{value:.{digits}f}" if size >= 0.001 or size == 0 else f"{value:.1e}"
    text = text.replace("-", "−")
    return f"+{text}" if signed and value > 0 else text


def probability(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def plain(value: Any) -> Any:
    """The value as JSON has it: NaN and infinity become null, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def render(template: str, *folders: Path, **values: Any) -> str:
    """A page. ``folders`` come before the shared templates. Raises: UnsupportedError when jinja2 is not there."""
    try:
        import jinja2
    except ImportError:
        raise UnsupportedError("pages: jinja2 is not installed: pip install -e '.[bench]'") from None
    loader = jinja2.FileSystemLoader([*folders, TEMPLATES])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "probability": probability, "percent": percent, "plain": plain}
    environment.globals["svg"] = lambda text: jinja2.filters.do_mark_safe(text)  # drawn here: ``plots`` escapes names
    return environment.get_template(template).render(**values)
