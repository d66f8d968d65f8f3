"""The person of a reference clip seen to move as is wanted: frames of the clip, and in them mouths of others of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avatar_rt.models.motion import FRAMES_PER_LATENT
from avatar_rt.scene.matte import place_person
from avatar_rt.scene.mouth import move_mouth
from avatar_rt.scene.units import head_units, mouth_units

AMPLITUDE = 1.5  # what a mouth that is believed moves too little: an estimate of little certainty lies near the mean
LEAD = FRAMES_PER_LATENT + 1  # frames before the first that is wanted, for an encoder to begin with


@dataclass(frozen=True)
class Performance:
    """
    Attributes:
        frames: uint8 [F, H, W, 3] of the clip, face-centred crops, F = 1 + 4 R.
        motion: fp32 [F, M] of them, normalised; poses: fp32 [F, M] in natural units.
        mattes: fp32 [F, H, W] of the person, and scene uint8 [H, W, 3] to put it before; None: the frames as they are.
    """

    frames: np.ndarray
    motion: Tensor
    poses: np.ndarray
    mattes: np.ndarray | None = None
    scene: np.ndarray | None = None

    def __call__(self, told: Tensor, before: Tensor | None = None) -> tuple[np.ndarray, Tensor]:
        """The person moving as told.

        Args:
            told: [T, 4, M] normalised motion; before: [M] of the frame before it, or None.

        Returns: pictures uint8 [LEAD + 4 T, H, W, 3], the first LEAD of them what went before in the clip, and the
            motion [T, 4, M] of the heads that are shown, with their own mouths.
        """
        theirs = self.motion[1:].unflatten(0, (-1, FRAMES_PER_LATENT))
        units = head_units(told, theirs, before)
        heads = (FRAMES_PER_LATENT * units[:, None] + 1 + torch.arange(FRAMES_PER_LATENT)).flatten()
        usual = self.motion.mean(0)
        mouths = mouth_units(usual + AMPLITUDE * (told.flatten(0, 1) - usual), self.motion, heads)
        lead = (heads[0] + torch.arange(-LEAD, 0)).clamp(min=0)
        return self.pictures(torch.cat([lead, heads]).tolist(), torch.cat([lead, mouths]).tolist()), theirs[units]

    def pictures(self, heads: list[int], mouths: list[int]) -> np.ndarray:
        """uint8 [n, H, W, 3]: frames ``heads`` of the clip with the mouths of frames ``mouths``, before the scene."""
        faces = np.stack([
            self.frames[i] if i == j else move_mouth(self.frames[i], self.poses[i], self.frames[j], self.poses[j])
            for i, j in zip(heads, mouths, strict=True)
        ])  # fmt: skip
        if self.mattes is None or self.scene is None:
            return faces
        return place_person(faces, self.mattes[heads], self.scene)
