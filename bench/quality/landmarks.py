"""The motion encoder against MediaPipe on real clips: ``python -m bench.quality.landmarks --model FILE --real DIR``.

The corpus gives exact motion, but of rendered faces. MediaPipe's face landmarker reads the same 52 coefficients and a
head pose off real video; it is a reading too, but of a network that saw many people. Per clip and channel: Pearson's r
of the two over the frames that MediaPipe finds a face in; the table shows the median over clips, and how many of them
the channel moves in at all. Needs ``pip install mediapipe`` (1.2) and its model file, ``face_landmarker.task``, both
yours to bring: nothing else here depends on them. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt.config import FPS
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError, InputError, UnsupportedError
from avatar_rt.media.reader import read_video
from avatar_rt.models.motion import ARKIT_NAMES, MOTION_NAMES, motion_index
from bench.quality.faces import crops, find_faces
from bench.quality.motion import correlation, read_motion

SHOWN = (
    "jawOpen", "mouthPucker", "mouthFunnel", "mouthSmileLeft", "eyeBlinkLeft", "eyeBlinkRight", "browInnerUp",
    "yaw", "pitch", "roll",
)  # fmt: skip
SIDE = 256  # of the squares that both are shown
MOVES = {"yaw": 0.02, "pitch": 0.02, "roll": 0.02}  # radians; a coefficient moves from a deviation of 0.02 on
MAX_SECONDS = 8.0


def angles(matrix: np.ndarray) -> tuple[float, float, float]:
    """Yaw, pitch and roll in radians, signed as MOTION_NAMES, of MediaPipe's pose [4, 4].

    Its camera looks along -z with y up, and the face looks along +z: turning to the picture's right is a positive
    rotation about y, looking down a positive one about x, tilting anticlockwise a positive one about z.
    """
    r = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    return (
        float(np.arctan2(r[0, 2], r[2, 2])),
        float(-np.arcsin(np.clip(r[1, 2], -1, 1))),
        float(np.arctan2(r[1, 0], r[1, 1])),
    )


def open_landmarker(model: Path) -> Any:
    """MediaPipe's landmarker for video. Raises UnsupportedError without the package, InputError without the file."""
    if importlib.util.find_spec("mediapipe") is None:
        raise UnsupportedError("landmarks: the package mediapipe is not installed; pip install mediapipe==1.2.2")
    if not model.is_file():
        raise InputError(f"{model}: expected MediaPipe's face_landmarker.task, there is no such file")
    from mediapipe.tasks.python import BaseOptions, vision

    return vision.FaceLandmarker.create_from_options(
        vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)), running_mode=vision.RunningMode.VIDEO,
            output_face_blendshapes=True, output_facial_transformation_matrixes=True,
        )
    )  # fmt: skip


def landmarks(model: Path, squares: np.ndarray) -> np.ndarray:
    """What MediaPipe reads off uint8 [F, S, S, 3]: fp64 [F, 62], NaN without a face and where it says nothing."""
    import mediapipe as mp

    out = np.full((len(squares), len(MOTION_NAMES)), np.nan)
    with open_landmarker(model) as landmarker:
        for i, square in enumerate(squares):
            image = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(square))
            found = landmarker.detect_for_video(image, i * 1000 // FPS)
            if not found.face_blendshapes:
                continue
            for shape in found.face_blendshapes[0]:
                if shape.category_name in ARKIT_NAMES:
                    out[i, motion_index(shape.category_name)] = shape.score
            pose = angles(np.asarray(found.facial_transformation_matrixes[0]))
            for name, value in zip(("yaw", "pitch", "roll"), pose, strict=True):
                out[i, motion_index(name)] = value
    return out


def agreement(read: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Pearson's r of SHOWN between two readings [F, 62]; NaN where a channel hardly moves in ``other``."""
    result = {}
    for name in SHOWN:
        a, b = read[:, motion_index(name)], other[:, motion_index(name)]
        known = ~np.isnan(b)
        moves = known.any() and np.std(b[known]) >= MOVES.get(name, 0.02)
        result[name] = correlation(a[known], b[known]) if moves else float("nan")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.landmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="face_landmarker.task")
    parser.add_argument("--real", type=Path, required=True, help="folder of clips")
    parser.add_argument("--bundle", type=Path, help="whose motion encoder; default: the shipped one")
    parser.add_argument("--count", type=int, help="only the first clips")
    a = parser.parse_args(arguments)
    rows = {}
    try:
        open_landmarker(a.model).close()
        files = sorted(p for p in a.real.glob("*") if p.suffix in (".mp4", ".mpg"))[: a.count]
        if not files:
            raise InputError(f"{a.real}: expected clips (.mp4 or .mpg), found none")
        encoder = AvatarEngine(a.bundle).motion
        for path in files:
            frames = read_video(path, max_seconds=MAX_SECONDS, max_side=800).frames
            faces = find_faces(frames)
            other = landmarks(a.model, crops(frames, faces, SIDE))
            rows[path.stem] = agreement(read_motion(frames, faces, encoder), other)
            print(path.stem, " ".join(f"{k} {v:.2f}" for k, v in rows[path.stem].items()), file=sys.stderr, flush=True)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    result = {}
    print(f"{'channel':16}{'median r':>10}{'clips':>7}")
    for name in SHOWN:
        known = [row[name] for row in rows.values() if not np.isnan(row[name])]
        result[name] = {"median_r": float(np.median(known)) if known else None, "clips": len(known)}
        print(f"{name:16}{format(np.median(known), '.2f') if known else 'n/a':>10}{len(known):>7}")
    print(json.dumps({"clips": len(rows), "agreement": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
