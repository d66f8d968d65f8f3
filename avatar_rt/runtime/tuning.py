"""A tuning file: what ``python -m bench.tune`` found to be fastest on one device, as the engine reads it.

JSON with the device and the versions that the search ran on, and one value per setting. A file of another device or
other versions says nothing about this machine: it is left aside with a warning when it was found beside a bundle, and
refused when it was asked for. No setting changes what is computed beyond the rounding by which implementations differ.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from avatar_rt.errors import ArtifactError

FORMAT = 1
NAME = "tuning.json"  # beside a bundle's config.json


@dataclass(frozen=True)
class Settings:
    """What can be chosen. The defaults are what runs without a tuning file.

    Attributes:
        threads: Of the recorded kernels and of torch; 0 leaves torch's number.
        batched: All guidance passes of a step as one batch, else one after another through the modules.
        recorded_decoder: The VAE's decoder as recorded kernels, else its modules.
        linear_rows, norm_rows: Rows of a task of the recorded kernels; ``linear_rows`` a multiple of 24.
        spins: How often an idle thread looks for work before it sleeps.
        attention_tiles: On a GPU, the Triton tiles (rows, keys, warps, stages); empty takes the table's.
    """

    threads: int = 0
    batched: bool = True
    recorded_decoder: bool = True
    linear_rows: int = 48
    norm_rows: int = 32
    spins: int = 400
    attention_tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """Settings, and the device and versions that they belong to."""

    settings: Settings
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = "unknown"


def device_name(device: torch.device) -> str:
    """What a tuning file is keyed by: the GPU's name, or the CPU's model and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'cpu'}, {max(len(models), 1)} cores"


def versions() -> dict[str, str]:
    """What a search's result hangs on: torch's and the package's version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("avatar-rt")
    except PackageNotFoundError:
        own = "source"
    return {"torch": torch.__version__, "avatar_rt": own}


def save_tuning(path: Path, tuning: Tuning, found: dict[str, Any] | None = None) -> None:
    """Writes a tuning file; ``found`` is what the search measured, for whoever reads the file."""
    document = {"format": FORMAT, **asdict(tuning), "found": found or {}}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_tuning(path: Path) -> Tuning:
    """Raises: ArtifactError on a file that is missing or no tuning file."""
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ArtifactError(f"{path}: expected format {FORMAT}, got {raw['format']!r}")
        return Tuning(_settings(raw["settings"]), raw["device"], raw["versions"], raw["commit"])
    except OSError as e:
        raise ArtifactError(f"{path}: expected a tuning file ({e.strerror})") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{path}: expected a tuning file from python -m bench.tune, got {e!r}") from None


def _settings(raw: dict[str, Any]) -> Settings:
    values = {f.name: raw[f.name] for f in fields(Settings)}
    for f in fields(Settings):
        default = f.default
        value = tuple(values[f.name]) if isinstance(default, tuple) else values[f.name]
        if type(value) is not type(default) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{f.name}: expected {type(default).__name__}, got {values[f.name]!r}")
        values[f.name] = value
    settings = Settings(**values)
    if settings.linear_rows < 24 or settings.linear_rows % 24 or settings.norm_rows < 1:
        raise ValueError(f"linear_rows, norm_rows: expected a multiple of 24 and 1 or more, got {raw}")
    if settings.attention_tiles and len(settings.attention_tiles) != 4:
        raise ValueError(f"attention_tiles: expected rows, keys, warps, stages, got {settings.attention_tiles}")
    return settings


def stale(tuning: Tuning, device: torch.device) -> str | None:
    """None when a tuning is of this machine and these versions; else what differs."""
    here = device_name(device)
    if tuning.device != here:
        return f"it is for {tuning.device}, this is {here}"
    return None if tuning.versions == versions() else f"it is for {tuning.versions}, this is {versions()}"


def tuning_for(given: Path | None, bundle: Path, device: torch.device) -> Settings:
    """The settings of a given file, else of the bundle's ``tuning.json``, else the defaults.

    Raises: ArtifactError when a given file is not a tuning file of this machine and these versions.
    """
    if given is not None:
        tuning = read_tuning(given)
        reason = stale(tuning, device)
        if reason is not None:
            raise ArtifactError(f"{given}: {reason}: run python -m bench.tune")
        return tuning.settings
    beside = bundle / NAME
    if not beside.is_file():
        return Settings()
    try:
        tuning = read_tuning(beside)
        reason = stale(tuning, device)
    except ArtifactError as e:
        reason = str(e)
    if reason is not None:
        warnings.warn(f"{beside} is not used: {reason}; run python -m bench.tune", stacklevel=2)
        return Settings()
    return tuning.settings
