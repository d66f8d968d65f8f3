"""How the mouth of a reference answers its own sound: how open it is for what is heard, and how late.

An encoder reads an unknown face with an offset and a scale of its own, and people open their mouths by more or less.
Both are known where a reference speaks: mapped onto the other, what is heard of the jaw in its sound (by the speech
encoder's mouth head) has the mean and the spread of what is read off its pictures. People also differ in how far the
mouth is ahead of the sound (Schwartz and Savariaux, PLOS Computational Biology 2014): the lag at which the two agree
best says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LATEST = 3  # frames; a mouth that is later than that is another's sound or a file out of step
BELIEVED = 0.3  # r at the best lag; below it, what is heard and what is read have nothing to do with each other
_PER_FRAME = 0.03  # of r, that a frame of lag must be worth
_USUAL = (-0.2, 0.65)  # mean and spread of the jaw, normalised, as models tell it of rendered people
_WEIGHT = 50  # frames of a usual speaker that are added to what was heard: a second of speech says little of a mean
_MIN_FRAMES = 16  # for a correlation


@dataclass(frozen=True)
class Articulation:
    """A jaw that is told as x is to be found in a reference as ``level`` + ``gain`` x, both normalised.

    ``late``: frames, 0 to LATEST, by which the mouth is later than models make it.
    """

    level: float
    gain: float
    late: int = 0


def articulation(read: Tensor, heard: Tensor | None = None) -> Articulation:
    """Of the jaw as it is ``read`` off a reference's frames and as it is ``heard`` in their sound, fp32 [F] each,
    normalised; None: it has no sound."""
    mean, spread = _USUAL
    late = 0
    if heard is not None:
        r, lag = _agreement(read, heard)
        if r >= BELIEVED:
            share = len(heard) / (len(heard) + _WEIGHT)
            mean += share * (float(heard.mean()) - mean)
            spread += share * (float(heard.std(correction=0)) - spread)
            late = max(lag, 0)
    gain = float(read.std(correction=0)) / spread
    return Articulation(float(read.mean()) - gain * mean, gain, late)


def _agreement(read: Tensor, heard: Tensor) -> tuple[float, int]:
    """Pearson's r where it is best, and by how many frames ``read`` is behind ``heard`` there."""
    best, lag, count = -1.0, 0, len(read)
    for k in range(-LATEST, LATEST + 1):
        pair = torch.stack([read[max(k, 0) : count + min(k, 0)], heard[max(-k, 0) : count - max(k, 0)]]).double()
        if pair.shape[1] < _MIN_FRAMES or not bool((pair.std(1) > 0).all()):
            continue
        r = float(torch.corrcoef(pair)[0, 1])
        if r - _PER_FRAME * abs(k) > best - _PER_FRAME * abs(lag):
            best, lag = r, k
    return best, lag
