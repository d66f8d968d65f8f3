"""Files of tensors that cannot be mistaken, cut or altered unnoticed: safetensors with a kind, a format and a hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from avatar_rt.errors import ArtifactError, InputError

_KEY = "avatar_rt"
STORAGES = ("fp32", "bf16", "int8", "fp8")
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


def content_hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a JSON header and over name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_artifact(path: Path, kind: str, form: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file whole or not at all, and has it on the disk when this returns.

    Args:
        kind: What the file is, for instance ``avref``.
        form: Number of its format; other numbers are refused when it is read.
        header: What JSON can hold.

    Raises: InputError when the file cannot be written.
    """
    facts = {"kind": kind, "format": form, **header}
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    facts["content"] = content_hash(facts, plain)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(plain, part, metadata={_KEY: json.dumps(facts)})
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: the file cannot be written there ({getattr(e, 'strerror', None) or e})") from None
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_artifact(path: Path, kind: str, form: int, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, all of it checked.

    Raises: InputError when there is no such file; ArtifactError, which ends with ``remedy``, when it is of another kind
        or format, cut short or altered.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file of kind {kind}, but there is no such file")
    try:
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get(_KEY)
            facts = json.loads(text) if text else {}
            if facts.get("kind") != kind:
                raise ArtifactError(f"{path}: expected a file of kind {kind}, got {facts.get('kind')!r}; {remedy}")
            if facts.get("format") != form:
                raise ArtifactError(f"{path}: expected format {form} of {kind}, got {facts.get('format')!r}; {remedy}")
            # Clones are aligned as torch aligns: what matrix products round to may depend on it.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError):
        raise ArtifactError(f"{path}: cut short or damaged, it cannot be read as a file of {kind}; {remedy}") from None
    if facts.pop("content", None) != content_hash(facts, tensors):
        raise ArtifactError(f"{path}: does not match its own hash, so it was altered or damaged; {remedy}")
    return facts, tensors


def to_storage(x: Tensor, storage: str) -> tuple[dict[str, Tensor], float]:
    """A tensor as it is stored, and what that costs.

    Args:
        x: [..., D].
        storage: ``fp32``, ``bf16``; or ``int8``, ``fp8`` (e4m3) with an fp32 factor per row of D.

    Returns: the tensors by suffix ("" and, with factors, ".scale"), and the relative error: RMS of the difference over
        RMS of ``x``.
    Raises: InputError on another word.
    """
    if storage not in STORAGES or (storage == "fp8" and not hasattr(torch, "float8_e4m3fn")):
        raise InputError(f"storage: expected one of {', '.join(STORAGES)}, got {storage!r}")
    if storage in _PLAIN:
        stored = {"": x.to(_PLAIN[storage])}
    else:
        top = 127.0 if storage == "int8" else 448.0
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
        steps = x.float() / scale
        rows = steps.round().to(torch.int8) if storage == "int8" else steps.to(torch.float8_e4m3fn)
        stored = {"": rows, ".scale": scale.squeeze(-1)}
    back = from_storage(stored, torch.float32)
    error = (back - x.float()).square().mean().sqrt() / x.float().square().mean().sqrt().clamp(min=1e-30)
    return stored, float(error)


def from_storage(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The tensor that ``to_storage`` stored, in ``dtype``."""
    if ".scale" not in stored:
        return stored[""].to(dtype)
    return (stored[""].float() * stored[".scale"][..., None]).to(dtype)
