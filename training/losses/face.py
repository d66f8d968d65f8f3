"""Losses of face crops as the identity network sees them: who it is, what it looks like, how it changes."""

from __future__ import annotations

import torch
from torch import Tensor

from training.rewards.identity import IdentityNet


def identity(net: IdentityNet, made: Tensor, who: Tensor) -> Tensor:
    """One minus the cosine between each crop's embedding and the person's, averaged over a window's frames.

    made: [n L, 3, 80, 80]; who: [n, D] unit embeddings. Returns [n].
    """
    seen = net(made).unflatten(0, (len(who), -1))
    return 1 - (seen * who[:, None]).sum(-1).mean(1)


def perceptual(net: IdentityNet, made: Tensor, true: Tensor, count: int) -> Tensor:
    """Mean squared difference of channel-normalised maps (the form of arXiv 1801.03924), averaged over levels.

    made, true: [n L, 3, 80, 80] of ``count`` = n windows. Returns [n].
    """
    return torch.stack([per_window((a - b).square(), count) for a, b in _maps(net, made, true)]).mean(0)


def temporal(net: IdentityNet, made: Tensor, true: Tensor, count: int) -> Tensor:
    """The same for the change of the two finest maps from frame to frame (as arXiv 2412.09262 aligns video features):
    a flicker is in no single frame. Shapes as of ``perceptual``."""
    losses = []
    for a, b in _maps(net, made, true)[:2]:
        change = (a - b).unflatten(0, (count, -1)).diff(dim=1)
        losses.append(change.square().flatten(1).mean(1))
    return torch.stack(losses).mean(0)


def per_window(error: Tensor, count: int) -> Tensor:
    """[n L, ...] -> its mean for each of ``count`` = n windows."""
    return error.reshape(count, -1).mean(1)


def _maps(net: IdentityNet, made: Tensor, true: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        wanted = net.features(true)
    scaled = []
    for pair in zip(net.features(made), wanted, strict=True):
        a, b = (m.float() / m.float().square().mean(1, keepdim=True).add(1e-6).sqrt() for m in pair)
        scaled.append((a, b))
    return scaled
