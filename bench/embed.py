"""A face embedding that nothing here was trained on: dlib's ResNet (package face-recognition-models, CC0), 128-d."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np

from avatar_rt.scene.image import NOMINAL_FACE

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

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, bool]:
        """Embedding [128] of the largest face of uint8 [H, W, 3], and whether the detector saw one.

        Where it sees none, the place a face-centred crop has its face is taken, and the caller counts the miss.
        """
        scale = max(1, round(256 / min(image.shape[:2])))
        image = np.ascontiguousarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
        found = self.detector(image, 0)
        if found:
            rect = max(found, key=lambda r: r.area())
        else:
            h, w = image.shape[:2]
            x0, y0, x1, y1 = (round(v * s) for v, s in zip(NOMINAL_FACE, (w, h, w, h), strict=True))
            rect = self.dlib.rectangle(x0, y0, x1, y1)
        chip = self.dlib.get_face_chip(image, self.shape(image, rect), size=CHIP)
        v = np.array(self.net.compute_face_descriptor(chip))
        return v / np.linalg.norm(v), bool(found)

    def clip(self, frames: np.ndarray, count: int = 8) -> tuple[np.ndarray, int]:
        """Mean embedding of ``count`` evenly spaced frames, and in how many of them no face was detected."""
        picks = np.linspace(0, len(frames) - 1, count).round().astype(int)
        found = [self(frames[i]) for i in picks]
        mean = np.mean([v for v, _ in found], axis=0)
        return mean / np.linalg.norm(mean), sum(not seen for _, seen in found)
