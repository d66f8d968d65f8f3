"""What a run is (a frozen, typed value that a function in ``training/recipes`` returns), and what a method owes it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from avatar_rt.config import AvatarConfig, preset
from avatar_rt.errors import InputError

SCHEDULES = ("cosine", "constant", "wsd")
DEVICES = ("", "cpu", "cuda")
SHARDED_DTYPES = ("bfloat16", "float32")


class Method(Protocol):
    """One training stage: a module, its loss, its measure. The loop knows nothing else about it.

    Members that a method may have besides, found by name:
        steps: Of the whole run; set to the recipe's before the first step.
        to(device): Moves the module and whatever else the step needs; without it, only the module is moved.
        state_dict() / load_state_dict(state): Tensors beyond the module that training changes (an old policy, a
            running statistic), by name; kept in checkpoints.
        adopt(state, source): Takes up an earlier stage's weights (``--init``), by the names of the module's state, and
            returns the names that it did without.
        filled(): Called when weights that were built on the meta device have been given their first values.
        spread: Set before the first step where ranks share a batch: what the transformer's passes take under this name.
        describe(): Plain values (sizes, loss weights, data) for the checkpoint's ``metadata.json``.
    """

    module: nn.Module

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws one batch with ``generator`` and returns scalars, ``loss`` among them.

        The generator lives on the CPU and is new for every batch: a function of the recipe's seed, the step and the
        batch's number within the step. So a batch is the same whichever rank draws it and however often the run was
        broken off. What all batches of a step must have alike (their shape; with sharded weights also whether a
        condition is there at all) comes from ``common(step)``.

        ``samples``, a plain number, may be among the scalars: how many clips the batch holds (1 where it is missing).
        """
        ...

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Measures ``module`` on held-out data; may write pictures into ``out``, the run's ``validation`` folder."""
        ...

    def export(self, out: Path) -> None:
        """Writes the trained part as bf16 safetensors into ``out``."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A run. ``build(corpus)`` makes the method; the rest is the optimiser's and the loop's.

    Attributes:
        lr, warmup, weight_decay, betas: AdamW; the rate rises linearly for ``warmup`` steps, then follows ``schedule``.
        schedule: ``cosine`` falls to ``lr * final_lr``; ``constant`` stays; ``wsd`` stays until the last ``decay`` of
            the steps and falls linearly to ``lr * final_lr`` over those.
        muon_lr: When above 0, two-dimensional weights of hidden layers train with Muon at this rate.
        conv_muon_lr: When above 0, convolution weights train with Muon at this rate.
        ema: Decay of the averaged weights that are validated and exported; 0 is off.
        clip: Largest gradient norm; 0 is off.
        micro_batches: Batches that one step averages over, of all ranks together; 0 is one for each rank, or for those
            that share a batch.
        autocast: bf16 autocast around the step (fp32 master weights).
        compile: Backend of torch.compile for the blocks ("inductor"); "" is off.
        recompute: Blocks keep their inputs only and are computed again in the backward pass.
        sharded: With several ranks, FSDP2: weights, gradients, averages and optimiser states are split among them.
        sharded_dtype: What sharded weights are gathered as; they are kept, and gradients are summed, in fp32.
        ulysses, ring: So many ranks, one times the other, share every batch by sequence parallelism; neighbours.
        overfit: Handed to ``build``, which then pins the method to one clip.
        same_batch: Every step draws what the first one drew.
        log_every, checkpoint_every, validate_every: In steps.
        checkpoint_minutes: A checkpoint after so many minutes without one, too; 0 is off.
        keep_checkpoints: The newest so many are kept.
        eval_before_first_step: Validate before training, too.
        device: ``cpu`` or ``cuda``; "" is a GPU where there is one.
        threads: Of one process, on a CPU.
    """

    name: str
    build: Callable[..., Method]
    steps: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: str = "cosine"
    decay: float = 0.2
    muon_lr: float = 0.0
    conv_muon_lr: float = 0.0
    ema: float = 0.999
    clip: float = 1.0
    micro_batches: int = 0
    autocast: bool = True
    compile: str = ""
    recompute: bool = False
    sharded: bool = False
    sharded_dtype: str = "bfloat16"
    ulysses: int = 1
    ring: int = 1
    overfit: bool = False
    same_batch: bool = False
    seed: int = 0
    log_every: int = 25
    checkpoint_every: int = 250
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    validate_every: int = 500
    eval_before_first_step: bool = False
    device: str = ""
    threads: int = 1

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("device", self.device, DEVICES)
        _one_of("sharded_dtype", self.sharded_dtype, SHARDED_DTYPES)
        counts = ("log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "threads", "ulysses", "ring")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay: expected a share of the steps, 0 to 1, got {self.decay}")

    def method(self, corpus: Path) -> Method:
        """Builds the method. Raises InputError when ``overfit`` is asked of a recipe that cannot."""
        if self.overfit and "overfit" not in inspect.signature(self.build).parameters:
            raise InputError(f"overfit: recipe {self.name} cannot pin its method to one clip; same_batch can")
        method = self.build(corpus, overfit=True) if self.overfit else self.build(corpus)
        if hasattr(method, "steps"):
            method.steps = self.steps
        return method

    def describe(self) -> dict[str, Any]:
        """All fields as plain values; ``build`` by its name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made_by = f"{getattr(self.build, '__module__', '')}.{getattr(self.build, '__qualname__', self.build)}"
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {"build": made_by}

    def override(self, settings: list[str]) -> Recipe:
        """The recipe with ``KEY=VALUE`` settings of int, float, bool, str or tuple fields (``betas=0.9,0.95``)."""
        types = typing.get_type_hints(type(self))
        plain = {k: t for k, t in types.items() if t in _PARSERS or typing.get_origin(t) is tuple}
        values: dict[str, Any] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if key not in plain or not equals:
                raise InputError(f"--set {setting}: expected KEY=VALUE with KEY one of {', '.join(sorted(plain))}")
            values[key] = _parse(setting, text, plain[key])
        return dataclasses.replace(self, **values)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_PARSERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: _bool, str: str}


def _parse(setting: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        kinds, parts = list(typing.get_args(kind)), [p for p in text.strip("()").split(",") if p]
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(parts)
        if len(kinds) != len(parts) or any(k not in _PARSERS for k in kinds):
            raise InputError(f"--set {setting}: expected {len(kinds)} values with commas between them")
        return tuple(_parse(setting, part.strip(), k) for part, k in zip(parts, kinds, strict=True))
    try:
        return _PARSERS[kind](text)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else kind.__name__
        raise InputError(f"--set {setting}: expected {wanted}, got {text!r}") from None


def generator_of(seed: int, step: int, batch: int) -> torch.Generator:
    """The generator of one batch of one step, the same on every rank and in every attempt."""
    words = np.random.SeedSequence((seed, step, batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def common(step: int, seed: int = 0) -> torch.Generator:
    """A generator for what every batch of a step must choose alike: its bucket, a reference that is dropped."""
    return generator_of(seed, step, 2**31)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are, and its inputs have to be."""
    return next(module.parameters()).device


def merge(*metrics: Mapping[str, Any]) -> dict[str, Any]:
    """All metrics in one dictionary. Raises InputError where two have the same name."""
    whole: dict[str, Any] = {}
    for some in metrics:
        twice = sorted(whole.keys() & some.keys())
        if twice:
            raise InputError(f"metrics: expected every name once, got {', '.join(twice)} twice")
        whole.update(some)
    return whole


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors in a dictionary, tuple or list on ``device``; to a GPU from pinned memory, without waiting."""
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.device.type == "cpu":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    return type(batch)(to_device(v, device) for v in batch) if isinstance(batch, tuple | list) else batch


def configuration(weights: Path) -> AvatarConfig:
    """What is trained: ``config.json`` beside the parts that are trained already, or the preset ``tiny``."""
    path = weights / "config.json"
    return AvatarConfig.from_json(path.read_text()) if path.exists() else preset("tiny")
