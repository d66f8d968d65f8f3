"""A face embedding that nothing here was trained on: dlib's ResNet (package face-recognition-models, CC0), 128-d."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np

CHIP = 150  # the network's own input size


def available() -> str | None:
    """None when the embedder can run, else what to install."""
    for name in ("_dlib_pybind11", "face_recognition_models"):
        if importlib.util.find_spec(name) is None:
            return "dlib-bin and face-recognition-models are not installed: pip install -e '.[test]'"
    return None


class FaceEmbedder:
    """Unit-length 128-d embeddings of faces in pictures."""

    def __init__(self) -> None:
        import dlib

        spec = importlib.util.find_spec("face_recognition_models")
        models = Path(spec.submodule_search_locations[0]) / "models"  # type: ignore[index,union-attr]
        self.dlib = dlib
        self.shape = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.net = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))
        self.detector = dlib.get_frontal_face_detector()

    def __call__(self, image: np.ndarray, box: np.ndarray | None = None) -> np.ndarray | None:
        """Embedding [128] of the largest face of uint8 [H, W, 3], or of the given box; None when there is no face."""
        scale = max(1, round(256 / min(image.shape[:2])))
        image = np.ascontiguousarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
        if box is None:
            found = self.detector(image, 0)
            if not found:
                return None
            rect = max(found, key=lambda r: r.area())
        else:
            rect = self.dlib.rectangle(*(round(float(v) * scale) for v in box))
        chip = self.dlib.get_face_chip(image, self.shape(image, rect), size=CHIP)
        v = np.array(self.net.compute_face_descriptor(chip))
        return v / np.linalg.norm(v)

    def clip(self, frames: np.ndarray, count: int = 8, box: np.ndarray | None = None) -> tuple[np.ndarray | None, int]:
        """Mean embedding of ``count`` evenly spaced frames, and how many of them had no face."""
        picks = np.linspace(0, len(frames) - 1, count).round().astype(int)
        found = [v for v in (self(frames[i], box) for i in picks) if v is not None]
        if not found:
            return None, count
        mean = np.mean(found, axis=0)
        return mean / np.linalg.norm(mean), count - len(found)
