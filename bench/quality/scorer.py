"""Our own lip-sync scorer: the network of avatar_rt/models/sync.py with the weights beside this file.

What it measures by the LSE protocol (lse.py) is named ``LSE-C*``, ``LSE-D*`` and ``offset*``, and compares with nothing
but itself. Trained by training/methods/sync.py on rendered people only; ``weights/sync.json`` says with what.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.errors import InputError
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.media.mouth import mouth_crops
from avatar_rt.models.sync import PIXELS, SyncNetwork
from avatar_rt.models.weights import load_weights

WEIGHTS = Path(__file__).parent / "weights" / "sync.safetensors"


class SyncScorer:
    """The trained network, ready to embed a clip. Raises ArtifactError where the weights do not fit it."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self.network = SyncNetwork()
        load_weights(self.network, weights, dtype=torch.float32)
        self.network.eval()

    @torch.inference_mode()
    def points(self, frames: np.ndarray, boxes: np.ndarray, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the video's and the sound's windows: fp32 [F - 4, EMBEDDING] and [S // 640 - 4, EMBEDDING].

        Args:
            frames: uint8 [F, H, W, 3] at 25 fps.
            boxes: [F, 4], hairline to chin, smoothed.
            sound: fp32 [S] at 16 kHz.

        Raises: InputError on other shapes.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or boxes.shape != (len(frames), 4) or sound.ndim != 1:
            raise InputError(
                f"sync: expected frames [F, H, W, 3], boxes [F, 4] and sound [S], got {list(frames.shape)}, "
                f"{list(boxes.shape)} and {list(sound.shape)}"
            )
        return self.picture(mouth_crops(frames, boxes, PIXELS)), self.sound(sound)

    @torch.inference_mode()
    def picture(self, mouths: np.ndarray) -> np.ndarray:
        """Grey mouths [F, PIXELS, PIXELS] -> fp32 [F - 4, EMBEDDING]."""
        net = self.network
        return net.picture_points(net.picture_features(torch.from_numpy(mouths)[None]))[0].numpy()

    @torch.inference_mode()
    def sound(self, sound: np.ndarray) -> np.ndarray:
        """fp32 [S], as loud as it may be -> fp32 [S // 640 - 4, EMBEDDING]."""
        net, wave = self.network, normalise_loudness(sound, SAMPLE_RATE)
        return net.sound_points(net.sound_features(torch.from_numpy(wave)[None]))[0].numpy()
