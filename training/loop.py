"""The one loop that every method trains through."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from training import checkpoint, parallel
from training.optimiser import Average, clip_gradients, learning_rate, make_optimisers, set_rates
from training.parallel import World
from training.progress import Log, Meter
from training.recipe import Method, Recipe, generator_of
from training.weights import is_meta

HOPELESS = 50  # steps in a row without a finite gradient


class Run:
    """One run's state: method, optimisers, averaged weights, counts. The module's weights are final before it is made.

    Attributes:
        step: Steps taken. samples: Clips that they saw, of all ranks. skipped: Steps left out for a gradient that was
            not finite.
    """

    def __init__(
        self, recipe: Recipe, method: Method, out: Path, world: World, call: Callable[..., Any] | None = None
    ) -> None:
        self.recipe, self.method, self.out, self.world = recipe, method, out, world
        self.call = call or (lambda function, *args: function(*args))
        self.params = [p for p in method.module.parameters() if p.requires_grad]
        self.optimisers = make_optimisers(method.module, recipe)
        self.average = Average(method.module, recipe.ema) if recipe.ema else None
        self.meter = Meter()
        self.step = self.samples = self.skipped = self._skipped_in_a_row = 0
        self.turn, groups = world.draws
        self.batches = recipe.micro_batches or groups
        if self.batches % groups:
            each = "ranks" if world.share == 1 else f"groups of {world.share} ranks"
            raise InputError(f"micro_batches: expected a multiple of the {groups} {each}, got {self.batches}")

    # ---- training ------------------------------------------------------------------------------------------------

    def train_step(self) -> int:
        """One step of the optimisers; returns the clips that this rank saw, and no other that shares them."""
        recipe, samples = self.recipe, 0
        set_rates(self.optimisers, learning_rate(recipe, self.step))
        for p in self.params:
            p.grad = None
        self.method.module.train()
        at = 0 if recipe.same_batch else self.step
        drawn = range(self.turn, self.batches, self.world.draws[1])
        met = []
        for number in drawn:
            values = self._draw(at, number)
            samples += int(values.pop("samples", 1))
            (values["loss"] / len(drawn)).backward()
            met.append({k: v.detach() for k, v in values.items()})
        parallel.average_gradients(self.params, self.world)
        norm = clip_gradients(self.params, recipe.clip)
        self._apply(norm, met)
        self.step += 1
        return samples if self.world.rank % self.world.share == 0 else 0

    def _draw(self, at: int, number: int) -> dict[str, Tensor]:
        """The method's losses on batch ``number`` of the step."""
        generator = generator_of(self.recipe.seed, at, number)
        torch.manual_seed(generator.initial_seed())  # for layers that draw on their own
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.recipe.autocast):
            values = dict(self.call(self.method.step, at, generator))
        if "loss" not in values or "grad_norm" in values:
            told = ", ".join(values)
            raise InputError(f"{self.recipe.name}: expected loss among a step's metrics and no grad_norm, got {told}")
        return values

    def _apply(self, norm: Tensor, met: list[dict[str, Tensor]]) -> None:
        if not torch.isfinite(norm):  # a single bad batch must not end a run of hours
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == HOPELESS:
                raise InputError(
                    f"{self.recipe.name}: no finite gradient in {HOPELESS} steps up to {self.step}; "
                    f"start again from an earlier checkpoint, at a lower rate"
                )
            return
        self._skipped_in_a_row = 0
        for optimiser in self.optimisers:
            optimiser.step()
        for values in met:
            self.meter.add(values)
        self.meter.add({"grad_norm": norm})
        if self.average is not None:
            self.average.update(self.step + 1)

    # ---- measuring -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the module holds the averaged weights and is in evaluation mode."""
        self.method.module.eval()
        with self.average.swapped() if self.average is not None else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which a method measures without the ranks that share its batches, unless they all come along."""
        spread = getattr(self.method, "spread", None)
        if spread is not None and not self.is_sharded:
            self.method.spread = None  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if spread is not None:
                self.method.spread = spread  # type: ignore[attr-defined]

    def validate(self) -> dict[str, float]:
        """The method's measures, on the first rank; on all of them where each holds a part of the weights."""
        if not (self.world.is_first or self.is_sharded):
            return {}
        with tempfile.TemporaryDirectory() as nowhere, self.averaged(), torch.no_grad():
            folder = self.out / "validation" if self.world.is_first else Path(nowhere)
            folder.mkdir(exist_ok=True)
            # Weights are gathered in the recipe's dtype, so what meets them must be cast as in training.
            autocast = torch.autocast(self.world.device.type, torch.bfloat16, self.recipe.autocast and self.is_sharded)
            with autocast, self.alone():
                return self.call(self.method.validate, self.step, folder)

    def export(self, corpus: Path) -> None:
        """Has the method write its averaged weights. Sharded ones are put together in a method built anew."""
        with self.averaged():
            if not self.is_sharded:
                if self.world.is_first:
                    self.method.export(self.out)
                return
            whole = parallel.whole_state(self.method.module.state_dict(), self.world)
        if self.world.is_first:
            method = self.recipe.method(corpus)
            method.module.load_state_dict(whole)
            method.module.eval()
            if hasattr(method, "load_state_dict"):
                method.load_state_dict(self.method.state_dict())
            method.export(self.out)

    @property
    def is_sharded(self) -> bool:
        return self.recipe.sharded and self.world.size > 1

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        module = self.method.module
        parts = {"module": module.state_dict(), "optimiser": checkpoint.optimiser_state(module, self.optimisers)}
        if self.average is not None:
            parts["average"] = self.average.state
        if hasattr(self.method, "state_dict"):
            parts["method"] = self.method.state_dict()
        return {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    def save(self) -> None:
        described = self.method.describe() if hasattr(self.method, "describe") else {}
        notes = {"recipe": self.recipe.name, "config": self.recipe.describe(), "method": described,
                 "samples": self.samples, "skipped": self.skipped}  # fmt: skip
        checkpoint.save(self.out, self.step, self._state(), notes, self.world, self.recipe.keep_checkpoints)

    def load(self, folder: Path) -> list[str]:
        """Takes up a checkpoint; returns a line for each recipe field that was another when it was written."""
        notes = checkpoint.read_notes(folder)
        if notes["recipe"] != self.recipe.name:
            raise InputError(f"{folder}: holds a run of recipe {notes['recipe']!r}, got {self.recipe.name!r}")
        stored = checkpoint.stored_sizes(folder)
        checkpoint.prepare_optimisers(self.method.module, self.optimisers, stored, "optimiser.")
        state = self._state()
        checkpoint.load(folder, state)
        if hasattr(self.method, "load_state_dict"):
            start = "method."
            self.method.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
        self.step, self.samples, self.skipped = notes["step"], notes["samples"], notes["skipped"]
        checkpoint.load_random_state(folder, self.world)
        now = self.recipe.describe()
        return [f"{k} {v} (was {notes['config'].get(k)})" for k, v in now.items() if notes["config"].get(k) != v]


class Stop:
    """Whether SIGINT or SIGTERM came. The second one is not waited for."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self._restore()


def train(
    recipe: Recipe, corpus: Path, out: Path, *, resume: bool | int | str = False, init: Path | None = None,
    until: int | None = None, minutes: float | None = None,
) -> Run:  # fmt: skip
    """Runs a recipe to its end, writing checkpoints, ``metrics.jsonl``, validation pictures and the exported part.

    Args:
        resume: True or "latest" continues from the newest checkpoint in ``out``, if there is one; a number from that
            step's.
        init: Weights to start from, see ``checkpoint.start_from``.
        until, minutes: Stop with a checkpoint after this step, or after so long.

    Raises: KeyboardInterrupt on SIGINT or SIGTERM, after a checkpoint. InputError, ArtifactError.
    """
    world = parallel.start(recipe.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        which = "latest" if resume is True else str(resume)
        folder = checkpoint.find(out, which) if resume is not False else None
        if resume is False and checkpoint.steps_of(out):
            raise InputError(f"{out}: holds checkpoints; add --resume, or take another --out")
        method = recipe.method(corpus)
        run, told = _set_up(recipe, method, out, world, init if folder is None else None)
        if folder is not None:
            told += [f"continues from {folder.name}"] + [f"  with {line}" for line in run.load(folder)]
        log = Log(out, recipe.name, run.step, recipe.steps, world)
        try:
            size = sum(p.numel() for p in method.module.parameters())
            log.say(f"{recipe.name}: {size / 1e6:.2f} M parameters, steps {run.step}..{recipe.steps}, "
                    f"{world.size} rank(s) on {world.device.type}, {run.batches} batch(es) a step")  # fmt: skip
            for line in told:
                log.say(line)
            _loop(run, log, until, minutes)
            if run.step >= recipe.steps:
                run.export(corpus)
        finally:
            log.close()
        world.wait()
    finally:
        parallel.finish(world)
    return run


def _set_up(recipe: Recipe, method: Method, out: Path, world: World, init: Path | None) -> tuple[Run, list[str]]:
    """The method on its device, the same on every rank, its blocks wrapped and its weights sharded as asked; and what
    is to be told of its start. Weights that were built on the meta device are filled where they will be."""
    module, call = method.module, None
    empty, sharded = is_meta(module), recipe.sharded and world.size > 1
    if empty and getattr(method, "table", True) is None:
        raise InputError(f"{recipe.name}: expected a corpus that was encoded for it (CORPUS/weights), there is none")
    if not empty:
        getattr(method, "to", module.to)(world.device)
        parallel.broadcast(module, world)
    world = parallel.share_batches(method, recipe, world)
    parallel.wrap_blocks(module, recipe)
    if sharded:
        call = parallel.shard(module, recipe, world)
    elif empty:
        parallel.fill_in_order(module, world.device)
    if empty:
        getattr(method, "filled", lambda: None)()
    told = [checkpoint.start_from(method, init)] if init is not None else []
    return Run(recipe, method, out, world, call), told


def _loop(run: Run, log: Log, until: int | None, minutes: float | None) -> None:
    recipe, world = run.recipe, run.world
    last = recipe.steps if until is None else min(until, recipe.steps)
    started = saved = marked = time.monotonic()
    if recipe.eval_before_first_step and run.step == 0:
        log.validated(0, 0, run.validate())
    with Stop() as stop:
        first = run.step
        while run.step < last:
            samples = run.train_step()
            now = time.monotonic()
            due = bool(recipe.checkpoint_minutes) and now - saved > 60 * recipe.checkpoint_minutes
            late = minutes is not None and now - started > 60 * minutes
            mine = (samples, stop.asked, *(flag and world.is_first for flag in (due, late)))
            seen, asked, due, late = world.total(*map(int, mine))  # all ranks must decide alike
            run.samples += seen
            log.advance(run.step)
            ends = run.step == last or asked or late
            if run.step % recipe.log_every == 0 or ends:
                own = {"lr": run.optimisers[0].param_groups[0]["lr"], "skipped": run.skipped,
                       "seconds_per_step": (now - marked) / max(run.step - first, 1)}  # fmt: skip
                log.trained(run.step, run.samples, run.meter.read(world), own)
                marked, first = now, run.step
            if run.step % recipe.checkpoint_every == 0 or due or ends:
                run.save()
                saved = time.monotonic()
            if asked:
                raise KeyboardInterrupt(f"stopped at step {run.step} with a checkpoint")
            if run.step % recipe.validate_every == 0 or run.step == recipe.steps:
                log.validated(run.step, run.samples, run.validate())
            if late:
                break
        if run.step < recipe.steps:
            log.say(f"stopped at step {run.step} of {recipe.steps}; --resume continues")
