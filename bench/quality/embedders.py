"""Face embeddings that nothing here was trained on: dlib's by default, ArcFace-class ONNX models by path.

dlib's ResNet and landmarks come in the package face-recognition-models (CC0), 128 numbers a face. Both kinds get the
face-centred square that the engine would cut (``faces.crops``), so the face's place in it is known and the box comes
from the detector that all measures share: dlib's own detector would see the same faces at 34 ms a picture, and over
the rendered cases the embedding separates people no worse without it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from avatar_rt.errors import ArtifactError, InputError, UnsupportedError
from avatar_rt.media.face import CROP_SIDE

SIDE = 256  # pixels of the squares
CHIP = 150  # pixels of dlib's network's input
# dlib's detector draws a square from the brows to under the chin: in heights of our box (hairline to chin), its side
# and how far its centre lies below ours. Fitted to both detectors on rendered faces.
_DLIB_SIDE, _DLIB_DROP = 0.80, 0.08
# Where ArcFace's alignment puts eyes, nose and corners of the mouth in a picture of 112 pixels.
_ARC_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
_ARC_SIDE = 112


class Embedder(Protocol):
    """Squares uint8 [side, side, 3] -> unit-length vectors [D]."""

    name: str
    side: int

    def __call__(self, square: np.ndarray) -> np.ndarray: ...


def available() -> str | None:
    """None when dlib's embedder can run, else what to install."""
    for name in ("_dlib_pybind11", "face_recognition_models"):
        if importlib.util.find_spec(name) is None:
            return "dlib-bin and face-recognition-models are not installed: pip install -e '.[test]'"
    return None


def open_embedder(path: Path | None = None) -> Embedder:
    """dlib's embedder, or the ONNX model at a path."""
    return DlibEmbedder() if path is None else OnnxEmbedder(path)


class _Landmarks:
    """dlib's landmarks of the face in a face-centred square."""

    def __init__(self, file: str) -> None:
        if (reason := available()) is not None:
            raise UnsupportedError(reason)
        import dlib

        self.dlib = dlib
        self.predict = dlib.shape_predictor(str(models() / file))

    def __call__(self, square: np.ndarray):  # type: ignore[no-untyped-def]  # dlib has no types
        height = len(square) / CROP_SIDE
        low, high = (round(len(square) / 2 + height * (_DLIB_DROP + s * _DLIB_SIDE / 2)) for s in (-1, 1))
        x0, x1 = (round(len(square) / 2 + s * height * _DLIB_SIDE / 2) for s in (-1, 1))
        return self.predict(square, self.dlib.rectangle(x0, low, x1, high))


def models() -> Path:
    """Folder of dlib's weights."""
    spec = importlib.util.find_spec("face_recognition_models")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "models"


class DlibEmbedder:
    """dlib's ResNet, 128-d. Raises UnsupportedError where its packages are not installed."""

    name, side = "dlib ResNet", SIDE

    def __init__(self) -> None:
        self.landmarks = _Landmarks("shape_predictor_5_face_landmarks.dat")
        self.dlib = self.landmarks.dlib
        self.net = self.dlib.face_recognition_model_v1(str(models() / "dlib_face_recognition_resnet_model_v1.dat"))

    def __call__(self, square: np.ndarray) -> np.ndarray:
        square = np.ascontiguousarray(square)
        chip = self.dlib.get_face_chip(square, self.landmarks(square), size=CHIP)
        v = np.array(self.net.compute_face_descriptor(chip))
        return np.asarray(v / np.linalg.norm(v))


class OnnxEmbedder:
    """An ArcFace-class model: one input [n, 3, S, S] of aligned faces, RGB in -1..1, one output [n, D].

    Raises: InputError on a path that is no such model; UnsupportedError where onnxruntime is not installed.
    """

    side = SIDE

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if importlib.util.find_spec("onnxruntime") is None:
            raise UnsupportedError(f"{path.name}: onnxruntime is not installed: pip install onnxruntime")
        if not path.is_file():
            raise InputError(f"{path}: expected an ONNX face model, there is no such file")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self.net = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's errors have no common base
            raise ArtifactError(
                f"{path}: expected an ONNX face model, onnxruntime says: {str(e).splitlines()[0]}"
            ) from e
        inputs = self.net.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise ArtifactError(f"{path}: expected one input [n, 3, S, S], got {[i.shape for i in inputs]}")
        self.name, self.size = path.stem, shape[2] if isinstance(shape[2], int) else _ARC_SIDE
        self.landmarks = _Landmarks("shape_predictor_68_face_landmarks.dat")

    def __call__(self, square: np.ndarray) -> np.ndarray:
        face = self.align(np.ascontiguousarray(square)).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        v = self.net.run(None, {self.net.get_inputs()[0].name: face})[0].reshape(-1).astype(np.float64)
        return np.asarray(v / np.linalg.norm(v))

    def align(self, square: np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3], eyes, nose and mouth where the model expects them."""
        found = self.landmarks(square)
        points = np.array([[p.x, p.y] for p in found.parts()], np.float64)
        five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
        return cv2.warpAffine(square, similarity_transform(five, _ARC_POINTS * self.size / _ARC_SIDE), (self.size,) * 2)


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scaling and shift [2, 3] that takes points [n, 2] nearest to others, in least squares."""
    # With z = x + iy it is one complex line: target = a z + b.
    z, w = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
