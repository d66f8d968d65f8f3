"""Which pieces of a reference a guide is put together from, as speech synthesis chooses recorded units.

A unit has a target cost, how unlike what is wanted it is, and between two of them there is a join cost, nothing where
the second is what followed the first in the recording; the cheapest way through all of them is taken (Hunt and Black,
ICASSP 1996). Heads are units of a latent, for they go on slowly; mouths are units of a frame, each from wherever in the
clip one is as open as the speech wants it, for all that a person does with the mouth is soon seen (Video Rewrite,
Bregler et al., SIGGRAPH 1997).
"""

from __future__ import annotations

import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, ROTATION, motion_index, mouth_channels

# All in squared differences of normalised motion.
HEAD_JAW = 3.0  # of a head's unit: how far its jaw is from what is wanted; the less it is, the less is to be put right
HEAD_JOIN, HEAD_LEAVE = 12.0, 20.0  # how its pose, gaze and lids go on elsewhere, and the price of leaving by itself
JAW, LIPS = 30.0, 0.2  # of a mouth's unit: its jaw, and each of its lips' channels
TURNED = 4.0  # the head it is seen on, turned and nodded otherwise than the one that it is put on
JOIN, LEAVE = 2.0, 0.3  # how the mouth goes on elsewhere, and the price of leaving by itself

_JAW = motion_index("jawOpen")
_MOUTH = mouth_channels(FRAMES_PER_LATENT * len(MOTION_NAMES))[: len(MOTION_NAMES)]
_TURN = slice(ROTATION.start, ROTATION.start + 2)  # yaw and pitch; a roll is undone in the picture


def cheapest(target: Tensor, join: Tensor) -> Tensor:
    """The cheapest of all ways through units (Viterbi): int64 [T], of target costs [T, N] and join costs [N, N], the
    second of the two units last."""
    cost, ways = target[0], []
    for row in target[1:]:
        through = cost[:, None] + join
        cost = through.amin(0) + row
        ways.append(through.argmin(0))
    found = [cost.argmin()]
    for way in reversed(ways):
        found.append(way[found[-1]])
    return torch.stack(found[::-1])


def head_units(told: Tensor, reference: Tensor, before: Tensor | None = None) -> Tensor:
    """Which of a reference's latents the heads are of.

    Args:
        told: [T, 4, M] normalised motion that is wanted; reference: [R, 4, M] what there is, one latent after another.
        before: [M] of the frame before the first that is wanted, or None.

    Returns: int64 [T] in 0..R - 1.
    """
    target = HEAD_JAW * torch.cdist(told[..., _JAW], reference[..., _JAW]).square()
    rest = reference[..., ~_MOUTH]
    going_on = torch.cat([rest[1:, 0], rest[-1:, -1]])
    join = HEAD_JOIN * torch.cdist(going_on, rest[:, 0]).square() + HEAD_LEAVE
    join.diagonal(1).zero_()
    if before is not None:
        target[0] += join[torch.cdist(before[None, ~_MOUTH], rest[:, -1])[0].argmin()]
    return cheapest(target, join)


def mouth_units(told: Tensor, reference: Tensor, heads: Tensor) -> Tensor:
    """Which of a reference's frames the mouths are of.

    Args:
        told: [F, M] normalised motion that is wanted; reference: [N, M] of all frames there are.
        heads: int64 [F] the frames whose heads they are put on.

    Returns: int64 [F] in 0..N - 1.
    """
    counts = (LIPS * _MOUTH).index_fill(0, torch.tensor(_JAW), JAW)
    ours, theirs = told * counts.sqrt(), reference * counts.sqrt()
    turned = torch.cdist(reference[heads, _TURN], reference[:, _TURN]).square()
    target = torch.cdist(ours, theirs).square() + TURNED * turned
    going_on = torch.cat([theirs[1:], theirs[-1:]])
    join = JOIN / JAW * torch.cdist(going_on, theirs).square() + LEAVE
    join.diagonal(1).zero_()
    return cheapest(target, join)
