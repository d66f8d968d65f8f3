"""SyncNet v2 as published, for users who have its weights: MFCC, crops and the two towers.

Chung and Zisserman, "Out of time: automated lip sync in the wild" (2016). The weights (``syncnet_v2.model``) come with
their own terms and are not part of this project: they are read from a path that the user gives, and only what they say
is printed as LSE-C and LSE-D. The published program's own check, which ``tests/test_sync.py`` repeats where it has both
files: its example.avi gives offset 3, minimum distance 5.353, confidence 10.021.

What differs here: boxes are those of our detector, not of S3FD, and the pictures do not pass through the two lossy
encodings (XVID, JPEG) between that program's steps.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.errors import ArtifactError

PIXELS = 224
CROP_SCALE, CROP_GREY, MEDIAN = 0.40, 110, 13
EMBEDDING = 1024
EPS = 1e-6  # torch.nn.functional.pairwise_distance adds it to every difference
MFCC_PER_FRAME, MFCC_WINDOW = 4, 20

_FRAME, _STEP, _FFT = 400, 160, 512
_FILTERS, _COEFFICIENTS, _LIFTER, _EMPHASIS = 26, 13, 22, 0.97
_TINY = np.finfo(np.float64).eps


@cache
def _mel_filters() -> np.ndarray:
    """Triangles between whole FFT bins, [26, 257]."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, _FILTERS + 2) / 2595) - 1)
    edges = np.floor((_FFT + 1) * hertz / SAMPLE_RATE).astype(int)
    filters = np.zeros((_FILTERS, _FFT // 2 + 1))
    for row, (low, mid, high) in zip(filters, zip(edges, edges[1:], edges[2:])):
        row[low:mid] = (np.arange(low, mid) - low) / (mid - low)
        row[mid:high] = (high - np.arange(mid, high)) / (high - mid)
    return filters


@cache
def _cosines() -> np.ndarray:
    """Orthonormal DCT-II with the lifter in it: [26, 13]."""
    k, n = np.arange(_COEFFICIENTS), np.arange(_FILTERS)[:, None]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * _FILTERS)) * np.sqrt(2 / _FILTERS)
    basis[:, 0] /= np.sqrt(2)
    return basis * (1 + _LIFTER / 2 * np.sin(np.pi * k / _LIFTER))


def mfcc(samples: np.ndarray) -> np.ndarray:
    """MFCC as python_speech_features computes them by default.

    Args:
        samples: int16 [S] at 16 kHz, not scaled: their size is part of the input.

    Returns: float64 [1 + ceil((S - 400) / 160), 13] at 100 Hz; coefficient 0 is the logarithm of the energy.
    """
    x = np.asarray(samples, np.float64)
    x = np.concatenate((x[:1], x[1:] - _EMPHASIS * x[:-1]))
    count = 1 + max(int(np.ceil((len(x) - _FRAME) / _STEP)), 0)
    x = np.pad(x, (0, max((count - 1) * _STEP + _FRAME - len(x), 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, _FRAME)[::_STEP][:count]
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2 / _FFT
    energy = power.sum(1)
    bands = power @ _mel_filters().T
    out = np.log(np.where(bands == 0, _TINY, bands)) @ _cosines()
    out[:, 0] = np.log(np.where(energy == 0, _TINY, energy))
    return out


def median_filter(values: np.ndarray, width: int = MEDIAN) -> np.ndarray:
    """Running median of [F]; beyond its ends stand zeros, as in scipy.signal.medfilt."""
    half = width // 2
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(values.astype(np.float64), half), width), axis=1)


def crops(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The published crop: uint8 [F, H, W, 3] RGB and boxes [F, 4] -> uint8 [F, 224, 224, 3] **BGR**."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    halves = median_filter(np.maximum(x1 - x0, y1 - y0) / 2)
    middles_x, middles_y = median_filter((x0 + x1) / 2), median_filter((y0 + y1) / 2)
    out = np.empty((len(frames), PIXELS, PIXELS, 3), np.uint8)
    for crop, frame, half, x, y in zip(out, frames, halves, middles_x, middles_y, strict=True):
        pad = int(half * (1 + 2 * CROP_SCALE))
        bgr = cv2.copyMakeBorder(frame[..., ::-1], pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(CROP_GREY,) * 3)
        x, y = x + pad, y + pad
        rows = slice(int(y - half), int(y + half * (1 + 2 * CROP_SCALE)))
        columns = slice(int(x - half * (1 + CROP_SCALE)), int(x + half * (1 + CROP_SCALE)))
        cut = bgr[rows, columns]
        crop[:] = cv2.resize(cut, (PIXELS, PIXELS)) if cut.size else CROP_GREY
    return out


def _layers(kind: type[nn.Module], norm: type[nn.Module], *rows: tuple[object, ...]) -> nn.Sequential:
    """Convolution, batch norm, ReLU, and where a row has it a pool: numbered as the published network is."""
    layers: list[nn.Module] = []
    for entry in rows:
        (given, taken, kernel, options), pool = entry[:4], entry[4] if len(entry) > 4 else None
        layers += [kind(given, taken, kernel, **options), norm(taken), nn.ReLU()]  # type: ignore[call-arg,arg-type]
        layers += [pool] if isinstance(pool, nn.Module) else []
    return nn.Sequential(*layers)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, EMBEDDING))


class SyncNet(nn.Module):
    """Both towers; parameter names and shapes are those of ``syncnet_v2.model``."""

    def __init__(self) -> None:
        super().__init__()
        same = {"padding": 1}
        self.netcnnaud = _layers(
            nn.Conv2d, nn.BatchNorm2d,
            (1, 64, 3, same, nn.MaxPool2d(1, 1)),
            (64, 192, 3, same, nn.MaxPool2d(3, (1, 2))),
            (192, 384, 3, same),
            (384, 256, 3, same),
            (256, 256, 3, same, nn.MaxPool2d(3, 2)),
            (256, 512, (5, 4), {}),
        )  # fmt: skip
        flat = {"padding": (0, 1, 1)}
        self.netcnnlip = _layers(
            nn.Conv3d, nn.BatchNorm3d,
            (3, 96, (5, 7, 7), {"stride": (1, 2, 2)}, nn.MaxPool3d((1, 3, 3), (1, 2, 2))),
            (96, 256, (1, 5, 5), {"stride": (1, 2, 2), **flat}, nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))),
            (256, 256, (1, 3, 3), flat),
            (256, 256, (1, 3, 3), flat),
            (256, 256, (1, 3, 3), flat, nn.MaxPool3d((1, 3, 3), (1, 2, 2))),
            (256, 512, (1, 6, 6), {}),
        )  # fmt: skip
        self.netfcaud, self.netfclip = _head(), _head()

    def sound(self, windows: Tensor) -> Tensor:
        """MFCC windows [N, 1, 13, 20] -> [N, 1024]."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))

    def picture(self, windows: Tensor) -> Tensor:
        """BGR crops 0..255 [N, 3, 5, 224, 224] -> [N, 1024]."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))


class SyncNetScorer:
    """SyncNet with weights that the user has.

    Raises: ArtifactError where ``path`` is not the published state dict, by names and shapes. Nothing is unpickled but
    tensors.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise ArtifactError(f"{path}: expected SyncNet's weights (syncnet_v2.model), got no such file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch.load raises what its many formats raise
            raise ArtifactError(f"{path}: cannot be read as SyncNet's weights ({type(e).__name__})") from None
        self.network = SyncNet()
        wanted = {k: tuple(v.shape) for k, v in self.network.state_dict().items() if "num_batches" not in k}
        found = {k: tuple(v.shape) for k, v in state.items() if "num_batches" not in k} if _is_state(state) else {}
        if found != wanted:
            odd = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            raise ArtifactError(
                f"{path}: expected the {len(wanted)} tensors of SyncNet v2, got {len(found)}; "
                f"first that differs: {odd[0]}, expected {wanted.get(odd[0])}, got {found.get(odd[0])}"
            )
        self.network.load_state_dict({k: state[k].float() for k in wanted}, strict=False)
        self.network.eval()

    @torch.inference_mode()
    def points(
        self, frames: np.ndarray, boxes: np.ndarray | None, sound: np.ndarray, count: int, batch: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings fp32 [count, 1024] of the first ``count`` windows of the picture and of the sound.

        Args:
            frames: uint8 [F, H, W, 3] RGB at 25 fps.
            boxes: [F, 4]; None where the frames are published crops of 224 pixels already.
            sound: fp32 [S] in -1..1, or int16.
        """
        pictures = frames[..., ::-1] if boxes is None else crops(frames, boxes)
        samples = sound if sound.dtype == np.int16 else np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
        cepstra = torch.from_numpy(mfcc(samples).T.copy()).float()[None]  # [1, 13, T]
        video, heard = [], []
        for first in range(0, count, batch):
            at = range(first, min(first + batch, count))
            cut = [torch.from_numpy(pictures[i : i + 5].copy()).permute(3, 0, 1, 2) for i in at]
            video.append(self.network.picture(torch.stack(cut).float()))
            windows = [cepstra[..., MFCC_PER_FRAME * i : MFCC_PER_FRAME * i + MFCC_WINDOW] for i in at]
            heard.append(self.network.sound(torch.stack(windows)))
        return torch.cat(video).numpy(), torch.cat(heard).numpy()


def _is_state(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
