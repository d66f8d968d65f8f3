"""Bundles: a directory with config.json, safetensors parts and a manifest of their hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import ArtifactError, InputError

FORMAT = 1
PARTS = ("dit", "vae", "speech", "motion", "text")


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its configuration, the path of each part, and one hash over all weights."""

    path: Path
    config: AvatarConfig
    parts: dict[str, Path]
    weights_hash: str


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shipped_bundle() -> Path:
    """Where the shipped ``tiny`` bundle is."""
    return Path(__file__).parent.parent / "weights" / "tiny"


def write_manifest(path: Path) -> None:
    """Writes ``manifest.json`` for the parts that lie in a bundle directory."""
    parts = {p: file_hash(path / f"{p}.safetensors") for p in PARTS if (path / f"{p}.safetensors").exists()}
    (path / "manifest.json").write_text(json.dumps({"format": FORMAT, "sha256": parts}, indent=2) + "\n")


def open_bundle(path: Path) -> Bundle:
    """Reads and checks a bundle.

    Raises: ArtifactError when a file is missing, altered or of another format.
    """
    path = Path(path)
    for name in ("config.json", "manifest.json"):
        if not (path / name).is_file():
            raise ArtifactError(f"{path}: expected a bundle directory with {name}, found none")
    try:
        config = AvatarConfig.from_json((path / "config.json").read_text())
        manifest = json.loads((path / "manifest.json").read_text())
    except (InputError, ValueError) as e:
        raise ArtifactError(f"{path}: {e}") from None
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}/manifest.json: expected format {FORMAT}, got {manifest.get('format')!r}")
    hashes = manifest.get("sha256", {})
    parts = {}
    for name in PARTS:
        part = path / f"{name}.safetensors"
        if name == "text" and not config.text.buckets:
            continue
        if not part.is_file():
            raise ArtifactError(f"{part}: missing from the bundle")
        if hashes.get(name) != file_hash(part):
            raise ArtifactError(f"{part}: does not match its hash in manifest.json: damaged or replaced")
        parts[name] = part
    whole = hashlib.sha256("".join(hashes[p] for p in sorted(parts)).encode()).hexdigest()
    return Bundle(path, config, parts, whole)
