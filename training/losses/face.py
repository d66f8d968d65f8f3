"""Losses of faces as the identity networks see them: who it is, what it looks like, how it changes."""

from __future__ import annotations

import torch
from torch import Tensor

from training.rewards.identity import IdentityNet, LatentIdentityNet


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


def likeness(net: LatentIdentityNet, made: Tensor, true: Tensor) -> Tensor:
    """Who it is and what it looks like, without decoding: one minus the cosine of the embeddings, plus the mean squared
    difference of channel-normalised maps, averaged over levels. The flow loss counts every number of a latent alike;
    this one those that tell people apart.

    made, true: [n, C, h, w] normalised latents. Returns [n].
    """
    with torch.no_grad():
        wanted = net.features(true)
        who = net.embed(wanted[-1])
    maps = net.features(made)
    unlike = 1 - (net.embed(maps[-1]) * who).sum(-1)
    errors = [(_even(a) - _even(b)).square().flatten(1).mean(1) for a, b in zip(maps, wanted, strict=True)]
    return unlike + torch.stack(errors).mean(0)


def per_window(error: Tensor, count: int) -> Tensor:
    """[n L, ...] -> its mean for each of ``count`` = n windows."""
    return error.reshape(count, -1).mean(1)


def _maps(net: IdentityNet, made: Tensor, true: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        wanted = net.features(true)
    return [(_even(a), _even(b)) for a, b in zip(net.features(made), wanted, strict=True)]


def _even(x: Tensor) -> Tensor:
    """Maps with channels of mean square 1 at each place."""
    return x.float() / x.float().square().mean(1, keepdim=True).add(1e-6).sqrt()
