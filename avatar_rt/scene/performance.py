"""The person of a reference clip seen to move as is wanted: frames of the clip, and in them mouths of others of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT, motion_index
from avatar_rt.scene.articulation import Articulation
from avatar_rt.scene.matte import place_person
from avatar_rt.scene.mouth import enlarged, mouth_move, put_mouth
from avatar_rt.scene.units import head_units, mouth_units

AMPLITUDE = 1.5  # what lips that are believed move too little: an estimate of little certainty lies near the mean
LEAD = FRAMES_PER_LATENT + 1  # frames before the first that is wanted, for an encoder to begin with
_JAW = motion_index("jawOpen")


@dataclass(frozen=True)
class Pictures:
    """What is shown of a clip, in one size.

    Attributes:
        frames: uint8 [F, H, W, 3] of the clip, face-centred crops.
        scene: uint8 [H, W, 3] to put the person before, and mattes: uint8 [F, H, W] how much of each pixel is theirs;
            None: the frames as they are.
    """

    frames: np.ndarray
    scene: np.ndarray | None = None
    mattes: np.ndarray | None = None


@dataclass(frozen=True)
class Take:
    """Frames of a clip in a new order: whose heads, whose mouths, and how each of these comes to its head ([3, 3], see
    ``scene.mouth``), None where it is the head's own. ``motion`` [T, 4, M] is that of the heads."""

    heads: list[int]
    mouths: list[int]
    moves: list[np.ndarray | None]
    motion: Tensor


@dataclass(frozen=True)
class Performance:
    """
    Attributes:
        small: The clip, F = 1 + 4 R, and the scene, as the model sees them; fine: the same some times as large, for the
            eye, or None.
        motion: fp32 [F, M] of the frames, normalised; poses: fp32 [F, M] in natural units.
        mouth: How the person's jaw answers what is told.
    """

    small: Pictures
    motion: Tensor
    poses: np.ndarray
    mouth: Articulation
    fine: Pictures | None = None

    def take(self, told: Tensor, before: Tensor | None = None) -> Take:
        """The person moving as told.

        Args:
            told: [T, 4, M] normalised motion; before: [M] of the frame before it, or None.

        Returns: LEAD + 4 T frames, the first LEAD of them what went before in the clip.
        """
        theirs, usual = self.motion[1:].unflatten(0, (-1, FRAMES_PER_LATENT)), self.motion.mean(0)
        wanted = usual + AMPLITUDE * (told - usual)
        wanted[..., _JAW] = self.mouth.level + self.mouth.gain * told[..., _JAW]
        units = head_units(wanted, theirs, before)
        heads = (FRAMES_PER_LATENT * units[:, None] + 1 + torch.arange(FRAMES_PER_LATENT)).flatten()
        mouths = mouth_units(wanted.flatten(0, 1), self.motion, heads)
        lead = (heads[0] + torch.arange(-LEAD, 0)).clamp(min=0)
        all_heads, all_mouths = torch.cat([lead, heads]).tolist(), torch.cat([lead, mouths]).tolist()
        frames, poses = self.small.frames, self.poses
        moves = [
            None if i == j else mouth_move(frames[i], poses[i], frames[j], poses[j])
            for i, j in zip(all_heads, all_mouths, strict=True)
        ]
        return Take(all_heads, all_mouths, moves, theirs[units])

    def pictures(self, take: Take) -> np.ndarray:
        """uint8 [n, H, W, 3] as the model sees them: the heads with their mouths, before the scene."""
        return self._made(self.small, take, 1)

    def finer(self, take: Take, count: int) -> np.ndarray | None:
        """The last ``count`` of the pictures in the finer size, uint8 [count, k H, k W, 3]; None where none is."""
        if self.fine is None:
            return None
        last = replace(take, heads=take.heads[-count:], mouths=take.mouths[-count:], moves=take.moves[-count:])
        return self._made(self.fine, last, self.fine.frames.shape[1] // self.small.frames.shape[1])

    def _made(self, of: Pictures, take: Take, scale: int) -> np.ndarray:
        made = np.stack([
            of.frames[i] if m is None else put_mouth(of.frames[i], self.poses[i], of.frames[j], enlarged(m, scale))
            for i, j, m in zip(take.heads, take.mouths, take.moves, strict=True)
        ])  # fmt: skip
        if of.mattes is None or of.scene is None:
            return made
        return place_person(made, of.mattes[take.heads], of.scene)
