"""Optimisers, their rate, gradient clipping and the averaged weights, for whole and for sharded tensors alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.muon import ConvMuon
from training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Factor on the base rate: linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
        return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    start = recipe.steps * (1 - recipe.decay)  # arXiv 2404.06395: warm up, stay, decay
    done = (step - start) / max(recipe.steps - start, 1)
    return 1 + (recipe.final_lr - 1) * min(max(done, 0.0), 1.0)


def make_optimisers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the hidden matrices (those in block lists) or convolutions, AdamW for the rest.

    Both Muons compute on sharded weights too: the products of their Newton-Schulz iteration gather what they need.
    """
    params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    muon = [p for n, p in params if recipe.muon_lr and p.ndim == 2 and "blocks." in n]
    convs = [p for _, p in params if recipe.conv_muon_lr and p.ndim > 2 and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in muon + convs}
    decay = [p for _, p in params if id(p) not in chosen and p.ndim >= 2]
    plain = [p for _, p in params if id(p) not in chosen and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = bool(params) and params[0][1].device.type == "cuda"
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)]
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


def set_rates(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor


def clip_gradients(params: list[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients to a norm of at most ``limit`` (0: leaves them); returns the norm they had, a scalar.

    The norm is of the whole gradient, also where every rank holds a part of it.
    """
    norm = get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if limit:
        clip_grads_with_norm_(params, limit, norm)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Average:
    """Exponential moving average of everything in a module's state; sharded as the module is.

    Early on the decay is (1 + n) / (10 + n), so that the random start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.state = {k: v.detach().clone() for k, v in _tensors(module).items()}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(local(self.state[k]), local(v.detach())) for k, v in _tensors(self.module).items()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the module's present state, the one after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        floats = [(a, v) for a, v in self._pairs() if v.is_floating_point() and v.numel()]
        if floats:
            torch._foreach_lerp_([a for a, _ in floats], [v for _, v in floats], 1 - decay)
        for a, v in self._pairs():
            if not v.is_floating_point():
                a.copy_(v)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for a, v in self._pairs():
            kept = v.clone()
            v.copy_(a)
            a.copy_(kept)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and lasting buffers by name; of tensors that share one storage, the first."""
    seen: set[int] = set()
    state = module.state_dict(keep_vars=True)
    return {k: v for k, v in state.items() if not (id(v) in seen or seen.add(id(v)))}
