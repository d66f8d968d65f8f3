"""The check against MediaPipe: signs of the head's angles, what counts as agreement, and a plain refusal without it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from avatar_rt.models.motion import MOTION_NAMES, motion_index
from bench.quality.landmarks import agreement, angles, main


def _turn(axis: int, by: float) -> np.ndarray:
    """Rotation [4, 4] about x, y or z by radians, at an arbitrary scale and place, as MediaPipe gives poses."""
    c, s = np.cos(by), np.sin(by)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(4)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    matrix[:3, :3] *= 1.7
    matrix[:3, 3] = (3.0, -2.0, -40.0)
    return matrix


def test_angles_have_the_signs_of_the_motion_space() -> None:
    for axis, of in ((1, 0), (0, 1), (2, 2)):  # y is yaw, x is pitch, z is roll
        for by in (-0.4, 0.0, 0.3):
            found = angles(_turn(axis, by))
            assert found[of] == pytest.approx(by)
            assert [found[k] for k in range(3) if k != of] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_agreement_counts_what_moves_and_what_is_known() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 0.2, (2, 100, len(MOTION_NAMES)))
    jaw, still = motion_index("jawOpen"), motion_index("mouthPucker")
    theirs[:, jaw] = 3 * ours[:, jaw] + 1
    theirs[:, still] = 0.5 + 1e-3 * rng.normal(size=100)
    theirs[:60, jaw] = np.nan  # frames in which no face was found
    found = agreement(ours, theirs)
    assert found["jawOpen"] == pytest.approx(1) and np.isnan(found["mouthPucker"])
    assert abs(found["yaw"]) < 0.4


def test_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "none.task"), "--real", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    if importlib.util.find_spec("mediapipe") is None:
        assert "the package mediapipe is not installed; pip install mediapipe" in told
    else:
        assert "none.task: expected MediaPipe's face_landmarker.task" in told


def test_head_pose_agrees_on_a_real_clip(recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("mediapipe") is None:
        pytest.skip("mediapipe is not installed: it is not a dependency")
    model = Path(os.environ["AVATAR_RT_DATA"]) / "models" / "face_landmarker.task"
    if not model.is_file():
        pytest.skip(f"{model}: MediaPipe's model is not there")
    assert main(["--model", str(model), "--real", str(recordings / "clips"), "--count", "1"]) == 0
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:11]}
    assert float(shown["pitch"]) > 0.7 and float(shown["roll"]) > 0.7
