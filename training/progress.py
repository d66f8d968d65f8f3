"""What a run says: bars on a terminal, plain lines elsewhere; ``metrics.jsonl`` always, TensorBoard where installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from training.parallel import World
from training.recipe import merge


class Meter:
    """Means of scalars over an interval. They stay on their device until ``read``, which waits for it once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, world: World) -> dict[str, float]:
        """The means over all ranks; the meter starts anew. Every rank must call it."""
        sums = list(self._sums.values())
        numbers = torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
        mine = {n: (s, self._counts[n]) for n, s in zip(self._sums, numbers, strict=True)}
        self._sums, self._counts = {}, {}
        total: dict[str, list[float]] = {}
        for some in world.gather(mine):
            for name, (value, count) in some.items():
                whole = total.setdefault(name, [0.0, 0])
                whole[0], whole[1] = whole[0] + value, whole[1] + count
        return {name: value / count for name, (value, count) in total.items()}


class Log:
    """Where a run's figures go. On ranks other than the first it says and writes nothing.

    Args:
        out: The run's folder; ``metrics.jsonl`` and ``tensorboard`` are in it. Lines after ``step`` are dropped: they
            are of steps that will be taken again.
    """

    def __init__(self, out: Path, name: str, step: int, steps: int, world: World) -> None:
        self.on, self.steps = world.is_first, steps
        self._first, self._started = step, time.monotonic()
        self._bar, self._board, self._file = None, None, None
        if not self.on:
            return
        path = out / "metrics.jsonl"
        _drop_after(path, step)
        self._file = path.open("a", buffering=1)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[told]}"))  # fmt: skip
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task(name, total=steps, completed=step, told="")
            self._bar.start()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.on:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def trained(self, step: int, samples: int, values: Mapping[str, float], own: Mapping[str, float]) -> None:
        """An interval's means, and what the loop itself counts."""
        if not self.on:
            return
        whole = merge({"step": step, "samples": samples}, values, own)
        self._write(whole, "train")
        told = " ".join(f"{k} {v:.4f}" for k, v in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, told=told)
            return
        rate = (step - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self.steps - step) / max(rate, 1e-9) / 60
        self.say(f"step {step}/{self.steps} {told} | {rate:.2f} step/s, {left:.1f} min left")

    def validated(self, step: int, samples: int, metrics: Mapping[str, float]) -> None:
        if self.on:
            self._write({"step": step, "samples": samples, "val": dict(metrics)}, "val")
            self.say(f"  val at {step}: " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def _write(self, line: dict[str, Any], kind: str) -> None:
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.get("val", line).items():
                if name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, line["step"])

    def close(self) -> None:
        for part, end in ((self._bar, "stop"), (self._board, "close"), (self._file, "close")):
            if part is not None:
                getattr(part, end)()


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to a step; a kill may have cut the last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept))
    os.replace(aside, path)
