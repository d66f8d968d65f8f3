"""Weights as safetensors: our files, and the published checkpoints of Wan 2.1 and TAVR under their own names.

Everything is checked from the headers before the first tensor is read, and every tensor is read before the module
changes, so a module is loaded whole or not at all. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.names import SCHEMES, Name, foreign_names

_INDEX = ".index.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """Where a tensor lies and what its header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """The headers of one checkpoint: every tensor by its name in the file, and the text metadata of all shards."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the headers of a checkpoint.

    Args:
        path: A safetensors file, its ``.index.json``, the name of a file that was saved in shards, or a directory
            with one of these.

    Raises: ArtifactError on a missing, truncated or damaged file, on a missing shard, and on pickled weights.
    """
    path = _locate(Path(path))
    if not path.name.endswith(_INDEX):
        tensors, metadata = _header(path)
        return Checkpoint(path, tensors, metadata)
    shards = _index(path)
    missing = sorted({name for name in shards.values() if not (path.parent / name).is_file()})
    if missing:
        total = len(set(shards.values()))
        raise ArtifactError(f"{path}: {len(missing)} of {total} shards are missing: {_few(missing)}")
    headers = {name: _header(path.parent / name) for name in sorted(set(shards.values()))}
    absent = [key for key, name in shards.items() if key not in headers[name][0]]
    if absent:
        raise ArtifactError(f"{path}: {len(absent)} tensors are not in the shards it names: {_few(absent)}")
    metadata = {k: v for _, found in headers.values() for k, v in found.items()}
    return Checkpoint(path, {key: headers[name][0][key] for key, name in shards.items()}, metadata)


def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    names: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, str]:
    """Give ``module`` the weights of a checkpoint. Parameters are replaced: build the optimiser afterwards.

    Args:
        module: Any of our modules; best built under ``torch.device("meta")``, so that memory is used once.
        path: As in ``open_checkpoint``.
        names: Whose names the file uses: None for ours, ``diffusers``, ``wan`` or ``tavr``.
        dtype: Floating-point dtype of the parameters; None keeps each tensor's own.
        device: Where the parameters go; None keeps the module's device (the CPU for a module on meta).

    Returns: the file's text metadata.
    Raises: ArtifactError when a name or shape differs or the file is damaged; InputError on a bad ``names``. The
        module is unchanged then.
    """
    ours = module.state_dict()
    checkpoint = open_checkpoint(path)
    named = _check_fit(checkpoint, module, names)
    by_file: dict[Path, list[str]] = {}
    for key in ours:
        by_file.setdefault(checkpoint.tensors[named[key].of(key)].file, []).append(key)
    state: dict[str, Tensor] = {}
    for file, keys in by_file.items():
        with _reading(file), safe_open(file, framework="pt") as stored:
            for key in keys:
                tensor = stored.get_tensor(named[key].of(key)).reshape(ours[key].shape)
                to = device if device is not None else "cpu" if ours[key].is_meta else ours[key].device
                # A copy, because what is read may be a view of the mapped file.
                state[key] = tensor.to(device=to, dtype=dtype if tensor.is_floating_point() else None, copy=True)
    module.load_state_dict(state, assign=True)
    return checkpoint.metadata


def save_weights(
    module: nn.Module,
    path: str | Path,
    *,
    names: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of ``module``. What was at ``path`` stays whole until the new file is.

    Args:
        path: ``<name>.safetensors``. In shards: ``<name>-00001-of-0000N.safetensors`` and, last, the index.
        names: As in ``load_weights``.
        dtype: Of the floating-point tensors in the file; None keeps each tensor's own.
        shard_bytes: Largest shard (a single larger tensor gets its own); None writes one file.
        metadata: Text kept in the header.

    Raises: InputError on a module that has no such names or is on meta, and when ``path`` can't be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"path: expected a name ending in .safetensors, got {path.name}")
    named = foreign_names(module, names)
    tensors = {}
    for key, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"module: expected weights to save, got {key} on the meta device")
        tensors[named[key].of(key)] = tensor.detach().reshape(named[key].shape(tensor))
    text = {"format": "pt", **(metadata or {})}
    shards = _shards(tensors, dtype, shard_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(shards) == 1:
            _write(path, tensors, dtype, text)
            _remove(path.with_name(path.name + _INDEX))
        else:
            _write_sharded(path, tensors, shards, dtype, text)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({e})") from None


# ---- reading ---------------------------------------------------------------------------------------------------------


def _locate(path: Path) -> Path:
    """The file or index to open for a path that may be a directory or the name of a sharded file."""
    if path.is_dir():
        for pattern in ("*.safetensors" + _INDEX, "*.safetensors"):
            found = sorted(p for p in path.glob(pattern) if not p.name.startswith("."))
            if len(found) == 1:
                return found[0]
            if found:
                got = _few([p.name for p in found])
                raise ArtifactError(f"{path}: expected one checkpoint, got {len(found)}: {got}")
        raise ArtifactError(f"{path}: expected a .safetensors file in this directory, got none")
    if path.suffix.lower() in _PICKLES:
        raise ArtifactError(_pickled(path))
    index = path.with_name(path.name + _INDEX)
    if not path.is_file() and index.is_file():
        return index
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a weight file, got nothing of this name")
    return path


def _pickled(path: Path) -> str:
    return f"{path}: expected safetensors, got pickled weights, which can run code when read; convert the file first"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror or e})") from None
    except SafetensorError as e:
        raise ArtifactError(f"{path}: damaged safetensors file ({e})") from None


def _header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """A file's tensors and metadata, after checking that the file is as long as its header says."""
    with _reading(path), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            if start.startswith((b"PK\x03\x04", b"\x80")):
                raise ArtifactError(_pickled(path))
            what = "a Git LFS pointer" if start == b"version " else f"{size} bytes that don't start with its header"
            raise ArtifactError(f"{path}: expected a safetensors file, got {what}")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {k: Stored(path, str(v["dtype"]), tuple(v["shape"])) for k, v in header.items()}
        end = max((int(v["data_offsets"][1]) for v in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ArtifactError(f"{path}: damaged safetensors file: its header of {length} bytes is unreadable") from None
    if size != 8 + length + end:
        raise ArtifactError(f"{path}: truncated or damaged: expected {8 + length + end} bytes, got {size}")
    return tensors, metadata


def _index(path: Path) -> dict[str, str]:
    with _reading(path):
        text = path.read_bytes()
    try:
        shards = json.loads(text)["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in shards.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise ArtifactError(f"{path}: expected an index with a weight_map from tensors to files beside it")
    return shards


def _check_fit(checkpoint: Checkpoint, module: nn.Module, names: str | None) -> dict[str, Name]:
    """Check every name, shape and kind of dtype before anything is read. Returns our name -> name in the file."""
    named, found = foreign_names(module, names), checkpoint.tensors
    wanted = {
        named[key].of(key): (named[key].shape(t), t.is_floating_point()) for key, t in module.state_dict().items()
    }
    parts = []
    for word, keys in (("missing", set(wanted) - set(found)), ("unexpected", set(found) - set(wanted))):
        if keys:
            parts.append(f"{len(keys)} {word} ({_few(sorted(keys))})")
    if parts:
        raise ArtifactError(
            f"{checkpoint.path}: expected the {len(wanted)} tensors of {type(module).__name__}, got {len(found)}: "
            f"{', '.join(parts)}{_names_hint(set(found), module, names)}"
        )
    wrong = []
    for key, (shape, floating) in wanted.items():
        stored = found[key]
        if stored.shape != shape or stored.dtype.startswith(("F", "BF")) != floating:
            kind = "floating point" if floating else "integers"
            wrong.append(f"{key} {stored.dtype} {list(stored.shape)} for {kind} {list(shape)}")
    if wrong:
        raise ArtifactError(f"{checkpoint.path}: {len(wrong)} tensors differ from what was expected: {_few(wrong)}")
    return named


def _names_hint(found: set[str], module: nn.Module, names: str | None) -> str:
    for scheme in (None, *SCHEMES):
        if scheme == names:
            continue
        try:
            named = foreign_names(module, scheme)
        except InputError:
            continue
        if found == {name.of(key) for key, name in named.items()}:
            return f"; names={scheme!r} would fit"
    return ""


def _few(items: list[str], limit: int = 3) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")


# ---- writing ---------------------------------------------------------------------------------------------------------


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _shards(tensors: dict[str, Tensor], dtype: torch.dtype | None, shard_bytes: int | None) -> list[list[str]]:
    """Names in order, cut where the next tensor would make a shard larger than ``shard_bytes``."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * _stored_dtype(tensor, dtype).itemsize
        if shard_bytes is not None and shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def _write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        ready = {k: t.to(device="cpu", dtype=_stored_dtype(t, dtype)).contiguous() for k, t in tensors.items()}
        save_file(ready, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _write_sharded(
    path: Path, tensors: dict[str, Tensor], shards: list[list[str]], dtype: torch.dtype | None, text: dict[str, str]
) -> None:
    """The old index goes before the first new shard and the new one comes last: what can be opened is never mixed."""
    index = path.with_name(path.name + _INDEX)
    files = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    _remove(index)
    for file, keys in zip(files, shards, strict=True):
        _write(path.with_name(file), {k: tensors[k] for k in keys}, dtype, text)
    total = sum(t.numel() * _stored_dtype(t, dtype).itemsize for t in tensors.values())
    where = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
    partial = path.with_name(f".{index.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    os.replace(partial, index)
    _remove(path)
    shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    for old in path.parent.iterdir():
        if shard.fullmatch(old.name) and old.name not in files:
            _remove(old)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
