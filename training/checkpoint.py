"""Checkpoints through torch.distributed.checkpoint: a folder ``checkpoint-<step>`` that is whole or not there.

    checkpoint-500/state/                 module, averaged weights, optimisers, the method's own tensors, counts
    checkpoint-500/random-00000.json      one for each rank: torch's generators
    checkpoint-500/metadata.json          step, recipe with all its fields, what the method says of itself, code commit

A folder is written aside and renamed, so that a run killed at any moment finds the one before. Sharded and whole
weights are stored alike: a run may go on with another number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.tensor import DTensor

from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.weights import load_weights, open_checkpoint
from training.parallel import World
from training.recipe import Method
from training.weights import put

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def steps_of(out: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending."""
    found = (_NAME.fullmatch(p.name) for p in out.glob("checkpoint-*") if (p / "metadata.json").is_file())
    return sorted(int(m[1]) for m in found if m)


def find(out: Path, which: str) -> Path | None:
    """The checkpoint ``latest`` (None where there is none yet) or that of a step. Raises InputError."""
    steps = steps_of(out)
    if which == "latest":
        return out / f"checkpoint-{steps[-1]}" if steps else None
    if not which.isdigit() or int(which) not in steps:
        held = ", ".join(map(str, steps)) or "none"
        raise InputError(f"--resume {which}: expected latest or the step of a checkpoint in {out} ({held})")
    return out / f"checkpoint-{int(which)}"


def commit() -> str:
    """The code's commit, with a + where files differ from it; "" outside of a repository."""
    root = Path(__file__).resolve().parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(out: Path, step: int, state: dict[str, Tensor], notes: dict[str, Any], world: World, keep: int) -> Path:
    """Writes ``checkpoint-<step>`` and removes all but the newest ``keep``. Every rank must call it."""
    final = out / f"checkpoint-{step}"
    aside = out / f"checkpoint-{step}.tmp"
    if world.is_first:
        for left in out.glob("checkpoint-*.tmp"):  # of a run that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    world.wait()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp.save(state, checkpoint_id=aside / "state")
    (aside / f"random-{world.rank:05d}.json").write_text(json.dumps(_random_state(world.device)))
    world.wait()
    if world.is_first:
        told = {"format": FORMAT, "step": step, "ranks": world.size, "torch": torch.__version__, "commit": commit()}
        (aside / "metadata.json").write_text(json.dumps(told | notes, indent=1) + "\n")
        _remove(final)
        os.replace(aside, final)
        steps = steps_of(out)
        for other in (s for s in steps if s > step or (s <= step and steps.index(step) - steps.index(s) >= keep)):
            _remove(out / f"checkpoint-{other}")  # a later one is of a run that was taken back to an earlier step
    world.wait()
    return final


def _remove(folder: Path) -> None:
    """Renamed first: half a checkpoint must not look like a whole one."""
    if folder.exists():
        doomed = folder.with_name(folder.name + ".tmp")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def optimiser_state(module: nn.Module, optimisers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """States by ``<parameter>.<state>``, tensors of the optimisers themselves."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value
        for optimiser in optimisers
        for p, held in optimiser.state.items()
        for key, value in held.items()
    }


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_notes(folder: Path) -> dict[str, Any]:
    """``metadata.json``. Raises ArtifactError when it is not of this format."""
    try:
        notes = json.loads((folder / "metadata.json").read_text())
        known = notes["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ArtifactError(
            f"{folder}/metadata.json: cannot be read ({e}); delete the folder, the one before serves"
        ) from e
    if not known:
        raise ArtifactError(f"{folder}: expected a checkpoint of format {FORMAT}, got {notes['format']}")
    return notes


def stored_sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor. Raises ArtifactError."""
    try:
        held = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
        return {k: (tuple(v.size), v.properties.dtype) for k, v in held.items()}
    except Exception as e:
        raise ArtifactError(f"{folder}: cannot be read ({e}); delete it, the one before serves") from None


def prepare_optimisers(
    module: nn.Module, optimisers: Iterable[torch.optim.Optimizer], stored: dict[str, Any], prefix: str
) -> None:
    """Gives optimisers that took no step yet the states that a checkpoint holds, as zeros to be read into."""
    names = {id(p): n for n, p in module.named_parameters()}
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            on_device = bool(group.get("fused") or group.get("capturable"))
            for p in group["params"]:
                start = f"{prefix}{names[id(p)]}."
                for key, (size, dtype) in stored.items():
                    if not key.startswith(start) or "." in key[len(start) :]:
                        continue
                    like = size == tuple(p.shape) and (size or on_device)
                    empty = torch.zeros_like(p, dtype=dtype) if like else torch.zeros(size, dtype=dtype)
                    optimiser.state[p][key[len(start) :]] = empty.to(p.device) if on_device else empty


def load(folder: Path, state: dict[str, Tensor]) -> None:
    """Reads into the tensors of ``state``. Every rank must call it. Raises ArtifactError, before anything is read."""
    stored = stored_sizes(folder)
    missing, beyond = sorted(state.keys() - stored.keys()), sorted(stored.keys() - state.keys())
    other = [k for k, v in state.items() if k in stored and tuple(v.shape) != stored[k][0]]
    if missing or beyond or other:
        told = [f"{len(found)} {what} ({found[0]})" for found, what in
                ((missing, "missing"), (beyond, "unknown"), (other, "of another shape")) if found]  # fmt: skip
        raise ArtifactError(f"{folder}: does not fit this run, tensors are {', '.join(told)}")
    _read(folder, state)


def _read(folder: Path, state: dict[str, Tensor], **options: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.load(state, checkpoint_id=folder / "state", **options)
    except (Exception, CheckpointException) as e:  # the second is a BaseException
        raise ArtifactError(f"{folder}: cannot be read ({_cause(e)}); delete it, the one before serves") from None


def _cause(error: BaseException) -> str:
    """The last line: what happened on a rank, without its traceback."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def load_random_state(folder: Path, world: World) -> None:
    """To be called last. A rank that the checkpoint does not know keeps its own state."""
    path = folder / f"random-{world.rank:05d}.json"
    if path.exists():
        _set_random_state(json.loads(path.read_text()), world.device)


def _random_state(device: torch.device) -> dict[str, str]:
    """torch's own generators; what methods draw comes from others, which are functions of seed and step."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: tensor.numpy().tobytes().hex() for kind, tensor in state.items()}


def _set_random_state(state: dict[str, str], device: torch.device) -> None:
    tensors = {kind: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for kind, text in state.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


# ---- weights to start from -------------------------------------------------------------------------------------------


def start_from(method: Method, init: Path) -> str:
    """Weights to start another run from; returns a line that says what they were.

    A method with ``adopt(state, source)`` is given what was found, by the names of its module's state, and returns
    the names that it did without. Else a checkpoint's tensors must have the module's shapes, and what it lacks keeps
    its random start.

    Args:
        init: A checkpoint, or a run's folder (its newest checkpoint): the averaged weights, where it keeps them. Or
            one safetensors file for the whole module, or a folder with one ``<part>.safetensors`` for each child.

    Raises: InputError when nothing there fits, ArtifactError when it cannot be read.
    """
    module = method.module
    if init.is_file() and not any(isinstance(p, DTensor) for p in module.parameters()):
        load_weights(module, init, dtype=torch.float32)
        return f"weights from {init}"
    state = _weights_at(method, init)
    if hasattr(method, "adopt"):
        new = len(method.adopt(state, str(init)))
        return f"weights from {init}" + (f" but for {new} tensors that this stage adds" if new else "")
    own = module.state_dict()
    other = [k for k, v in own.items() if k in state and v.shape != state[k].shape]
    if other or not own.keys() & state.keys():
        why = f"{other[0]} is {list(state[other[0]].shape)} there" if other else "no tensor has a name of this module"
        raise InputError(f"--init {init}: expected weights of this module, but {why}")
    put(module, {k: v for k, v in state.items() if k in own})
    new = len(own.keys() - state.keys())
    return f"weights from {init}" + (f", {new} of {len(own)} tensors start anew" if new else "")


def _weights_at(method: Method, init: Path) -> dict[str, Tensor]:
    if init.is_file():
        return load_file(open_checkpoint(init).path)
    folder = init if (init / "metadata.json").is_file() and (init / "state").is_dir() else find(init, "latest")
    return _parts(method, init) if folder is None else _weights(folder)


def _parts(method: Method, folder: Path) -> dict[str, Tensor]:
    """``<part>.<name>`` from the files of a module's children; which may lack, a method with ``adopt`` says."""
    names = [name for name, part in method.module.named_children() if part.state_dict()]
    absent = [f"{name}.safetensors" for name in names if not (folder / f"{name}.safetensors").is_file()]
    if len(absent) == len(names) or (absent and not hasattr(method, "adopt")):
        raise InputError(f"--init {folder}: expected a checkpoint or the parts {', '.join(names)}; "
                         f"{', '.join(absent)} is not there")  # fmt: skip
    held = {
        name: load_file(open_checkpoint(folder / f"{name}.safetensors").path)
        for name in names
        if f"{name}.safetensors" not in absent
    }
    return {f"{name}.{k}": v.float() if v.is_floating_point() else v for name, p in held.items() for k, v in p.items()}


def _weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's averaged weights, or those of its last step."""
    stored = stored_sizes(folder)
    kind = "average." if any(k.startswith("average.") for k in stored) else "module."
    state = {k: torch.empty(size, dtype=dtype) for k, (size, dtype) in stored.items() if k.startswith(kind)}
    _read(folder, state, no_dist=True)
    return {k.removeprefix(kind): v for k, v in state.items()}
