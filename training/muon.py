"""Muon for convolutions: momentum whose matrix [out, in x taps] is orthogonalised before it is applied.

torch.optim.Muon takes matrices only. Convolutions gain as much: on the tiny VAE 75 steps of it do what 140 of AdamW do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration that drives singular values to about 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class ConvMuon(torch.optim.Optimizer):
    """Muon on parameters of two or more dimensions, flattened to [out, rest]; update RMS matched to AdamW's.

    Args:
        params: Convolution weights [out, in, ...].
        lr: On AdamW's scale (the orthogonal update is multiplied by 0.2 sqrt(max(out, rest))).
        momentum: Of the gradient average; the update looks one step ahead (Nesterov).
        weight_decay: Decoupled.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]).reshape(p.shape[0], -1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to [m, n], roughly (singular values 0.7 to 1.2), computed in bf16."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)
