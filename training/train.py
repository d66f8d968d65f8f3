"""The training loop: ``python -m training.train --recipe vae --corpus DIR --out RUN [--resume] [--set steps=200]``.

Every method trains through this one loop. ``torchrun --nproc-per-node N -m training.train ...`` has N processes draw
their own batches and average their gradients (gloo); on few CPU cores that beats N threads. A checkpoint holds the
module, its average, the optimisers and the generator, is written atomically, and ``--resume`` continues from it: bit
for bit in one process on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from avatar_rt.errors import AvatarError, InputError
from avatar_rt.models.weights import open_checkpoint
from training.muon import ConvMuon
from training.recipe import Method, Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Factor on the base rate: linear warm-up, then a cosine down to ``final_lr``."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def make_optimisers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the hidden matrices (those in block lists) or convolutions, AdamW for the rest."""
    params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    muon = [p for n, p in params if recipe.muon_lr and p.ndim == 2 and "blocks." in n]
    convs = [p for _, p in params if recipe.conv_muon_lr and p.ndim > 2 and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in muon + convs}
    decay = [p for _, p in params if id(p) not in chosen and p.ndim >= 2]
    plain = [p for _, p in params if id(p) not in chosen and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)]
    if muon:
        optimisers.append(
            torch.optim.Muon(muon, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    if convs:
        optimisers.append(ConvMuon(convs, recipe.conv_muon_lr, weight_decay=recipe.weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers


class Run:
    """One run's mutable state: method, optimisers, average, generator, step."""

    def __init__(self, recipe: Recipe, method: Method, out: Path) -> None:
        self.recipe, self.method, self.out = recipe, method, out
        self.optimisers = make_optimisers(method.module, recipe)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.generator = torch.Generator().manual_seed(recipe.seed + self.rank)
        self.average = {k: v.detach().clone() for k, v in method.module.state_dict().items()} if recipe.ema else None
        self.step = 0

    def train_step(self) -> dict[str, float]:
        factor = learning_rate(self.recipe, self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.zero_grad(set_to_none=True)
        self.method.module.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.autocast):
            values = self.method.step(self.step, self.generator)
        values["loss"].backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.method.module.parameters(), self.recipe.clip)
        if torch.isfinite(norm):  # a single bad batch must not end a run of hours
            for optimiser in self.optimisers:
                optimiser.step()
        self.step += 1
        self._update_average()
        return {k: float(v.detach()) for k, v in values.items()} | {"grad_norm": float(norm)}

    @torch.no_grad()
    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        params = [p for p in self.method.module.parameters() if p.requires_grad]
        for p in params:  # a condition dropped on one rank may be used on another
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in params]) / self.world
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.method.module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def averaged(self) -> _Swap:
        """Context in which the module holds the averaged weights."""
        return _Swap(self.method.module, self.average)

    def save(self) -> None:
        state = {
            "step": self.step,
            "recipe": self.recipe.name,
            "module": self.method.module.state_dict(),
            "average": self.average,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "generator": self.generator.get_state(),
        }
        temporary = self.out / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if state["recipe"] != self.recipe.name:
            raise InputError(f"{self.out}: holds a run of recipe {state['recipe']!r}, got {self.recipe.name!r}")
        self.step = state["step"]
        self.method.module.load_state_dict(state["module"])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        if self.rank:  # only rank 0's generator is kept
            self.generator.manual_seed(self.recipe.seed + 1_000_003 * self.step + self.rank)


class _Swap:
    def __init__(self, module: nn.Module, average: dict[str, Any] | None) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.module.eval()
        if self.average is not None:
            self.raw = copy.deepcopy(self.module.state_dict())
            self.module.load_state_dict(self.average)

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self.module.load_state_dict(self.raw)


def train(recipe: Recipe, corpus: Path, out: Path, *, resume: bool = False, init: Path | None = None) -> Run:
    """Runs a recipe to its end, writing checkpoints, ``metrics.jsonl``, validation pictures and the exported part."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():  # set by torchrun
        dist.init_process_group("gloo")
    method = recipe.build(corpus)
    if hasattr(method, "steps"):  # --set steps=N reaches what the method spreads over the run, too
        method.steps = recipe.steps
    run = Run(recipe, method, out)
    if resume and (out / "checkpoint.pt").exists():
        run.load()
    elif init is not None:
        _start_from(run.method, init)
        run.average = {k: v.clone() for k, v in run.method.module.state_dict().items()} if recipe.ema else None
    if run.rank:
        run.average = None
    size = sum(p.numel() for p in run.method.module.parameters())
    print(f"{recipe.name}: {size / 1e6:.2f} M parameters, steps {run.step}..{recipe.steps}, {recipe.threads} thread(s)")
    log = (out / "metrics.jsonl").open("a", buffering=1) if run.rank == 0 else None
    started, first, recent = time.monotonic(), run.step, []
    while run.step < recipe.steps:
        values = run.train_step()
        if log is None:
            continue
        recent.append(values)
        if run.step % 25 == 0 or run.step == recipe.steps:
            mean = {k: sum(v[k] for v in recent if k in v) / sum(k in v for v in recent) for k in recent[-1]}
            recent = []
            rate = (run.step - first) / (time.monotonic() - started)
            left = (recipe.steps - run.step) / rate
            line = " ".join(f"{k} {v:.4f}" for k, v in mean.items())
            print(f"step {run.step}/{recipe.steps} {line} | {rate:.2f} step/s, {left / 60:.1f} min left", flush=True)
            log.write(json.dumps({"step": run.step, **mean}) + "\n")
        last = run.step == recipe.steps
        if run.step % recipe.checkpoint_every == 0 or last:
            run.save()
        if run.step % recipe.validate_every == 0 or last:
            with run.averaged(), torch.no_grad():
                metrics = run.method.validate(run.step, out)
            print("  val " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)
            log.write(json.dumps({"step": run.step, "val": metrics}) + "\n")
    if log is not None:
        with run.averaged():
            run.method.export(out)
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return run


def _start_from(method: Method, init: Path) -> None:
    """Weights of a checkpoint, or of a folder with one <part>.safetensors for each child of the module.

    A method with ``adopt(state, source) -> names`` may take those of an earlier stage, which lack what it adds.
    """
    if init.is_dir():
        state = {
            f"{name}.{key}": value.float() if value.is_floating_point() else value
            for name in dict(method.module.named_children())
            for key, value in load_file(open_checkpoint(init / f"{name}.safetensors").path).items()
        }
    else:
        saved = torch.load(init, weights_only=True)
        state = saved["average"] or saved["module"]
    if not hasattr(method, "adopt"):
        method.module.load_state_dict(state)  # copied: the optimisers hold these very parameters
    elif new := method.adopt(state, str(init)):
        print(f"{init}: lacks {len(new)} tensors that this stage adds; they start as initialised", flush=True)


def _overrides(recipe: Recipe, settings: list[str]) -> Recipe:
    types = {f.name: type(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in types or types[key] not in (int, float, bool, str):
            raise InputError(f"--set {setting}: expected KEY=VALUE with KEY one of {', '.join(sorted(types))}")
        values[key] = text == "true" if types[key] is bool else types[key](text)
    return dataclasses.replace(recipe, **values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train one stage from its recipe.")
    parser.add_argument("--recipe", required=True, help="MODULE or MODULE.FUNCTION in training/recipes")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out, if any")
    parser.add_argument("--init", type=Path, help="checkpoint, or folder of parts, to start the weights from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe field")
    args = parser.parse_args(argv)
    module, _, function = args.recipe.partition(".")
    try:
        try:
            recipes = importlib.import_module(f"training.recipes.{module}")
            recipe = getattr(recipes, function or module)()
        except (ImportError, AttributeError) as e:
            raise InputError(f"--recipe {args.recipe}: {e}") from None
        train(_overrides(recipe, args.set), args.corpus, args.out, resume=args.resume, init=args.init)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run again with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
