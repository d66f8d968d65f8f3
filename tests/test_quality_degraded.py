"""Motion, style, leakage, picture and drift on a few rendered cases: each measure tells the copy that is its own.

The faces of the true videos are the renderer's, so that nothing here hangs on a detector.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from bench.quality import drift, leakage, motion, style, visual
from bench.quality.cases import procedural, read_case
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context, ReferenceFacts
from bench.quality.degraded import degrade

COUNT = 4
MODULES = {"motion": motion, "style": style, "leakage": leakage, "visual": visual, "drift": drift}
MEASURES = {m.key: m for module in MODULES.values() for m in module.MEASURES}
REACTS = {key: copies for module in MODULES.values() for key, copies in module.REACTS.items()}
Table = dict[str, dict[str, np.ndarray]]


def true_faces(case: Case) -> Faces:
    boxes = case.truth["facebox"].astype(np.float32)
    return Faces(np.repeat(boxes.mean(0, keepdims=True), len(boxes), 0), np.ones(len(boxes), bool))


def leaked(case: Case) -> Clip:
    """The person in the reference's place."""
    assert case.target is not None
    frames = case.target.frames.copy()
    side = frames.shape[1]
    place = cv2.resize(case.truth["reference_background"], (side, side))
    hidden = leakage.person(case.truth["facebox"].astype(float), side, side, side)
    return Clip(np.where(hidden[..., None], frames, place))


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [read_case(path, 4) for path in procedural()[:COUNT]]


@pytest.fixture(scope="module")
def context(cases: list[Case]) -> Context:
    made = Context()
    for case in cases:  # the reference fills the standard crop, as its target does
        box = np.array([0.28, 0.21, 0.72, 0.79], np.float32) * case.reference.frames.shape[1]
        frames = len(case.reference.frames)
        faces = Faces(np.repeat(box[None], frames, 0), np.ones(frames, bool))
        made.references[case.name] = ReferenceFacts(case.name, case.identity, faces, {})
        for name in ("motion", "style", "leakage"):
            made.facts(case, name)
        change = visual.changes(visual.grey(visual.face_pictures(case.target.frames, true_faces(case))))
        made.references[case.name].facts["visual"] = {"change": change}
    return made


@pytest.fixture(scope="module")
def table(cases: list[Case], context: Context) -> Table:
    out: Table = {}
    for name in ("truth", "frozen", "other", "blurred", "drifting", "leaked"):
        rows = []
        for i, case in enumerate(cases):
            another = cases[(i + 1) % COUNT]
            video = leaked(case) if name == "leaked" else degrade(name, case, another)
            faces = true_faces(another if name == "other" else case)
            silent = Clip(video.frames)  # nothing here hears: a shifted sound changes nothing
            row: dict[str, float] = {}
            for part, module in MODULES.items():
                if name != "leaked" or part == "leakage":
                    row |= module.measure(case, silent, faces, context)
            rows.append(row)
        out[name] = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return out


def test_every_measure_has_a_key_of_its_own_and_is_given(table: Table) -> None:
    assert len(MEASURES) == sum(len(module.MEASURES) for module in MODULES.values())
    assert set(table["truth"]) == set(MEASURES)
    never = {"drift_identity", "drift_sync"}  # nobody gave their series
    sometimes = {"style_blink_intervals"}  # needs three blinks
    assert {k for k, v in table["truth"].items() if np.isnan(v).any()} <= never | sometimes


@pytest.mark.parametrize(("key", "copy"), [(key, copy) for key, copies in REACTS.items() for copy in copies])
def test_the_true_video_is_better(table: Table, key: str, copy: str) -> None:
    right, wrong = ([MEASURES[key].cost(v) for v in table[name][key]] for name in ("truth", copy))
    assert np.mean(right) < np.mean(wrong)


def test_the_true_video_is_nearly_perfect(table: Table) -> None:
    got = {key: float(np.mean(v)) for key, v in table["truth"].items()}
    assert got["mouth_r"] > 0.8 and abs(got["mouth_lag"]) < 1 and got["viseme_error"] < 0.35
    assert got["motion_energy"] == 1 and got["still_frames"] == 0 and got["ssim"] == pytest.approx(1)
    assert got["background_scene"] > 0.9 and abs(got["background_leak"]) < 0.25


def test_a_frozen_picture_is_told(table: Table) -> None:
    got = table["frozen"]
    assert (got["motion_energy"] == 0).all() and (got["still_frames"] == 1).all()
    assert (got["mouth_r"] == 0).all() and (got["style_distance"] > 1.5).all()


def test_another_persons_video_is_told(table: Table) -> None:
    assert np.mean(table["other"]["mouth_r"]) < 0.4
    assert np.mean(table["other"]["background_scene"]) < 0.5


def test_the_references_place_is_told(table: Table) -> None:
    leak, usual = table["leaked"]["background_leak"], table["truth"]["background_leak"]
    assert (leak > usual + 0.3).all() and leak.mean() > 0.7
    assert (table["leaked"]["background_scene"] < table["truth"]["background_scene"] - 0.1).all()


def test_drifting_colour_is_told_in_every_case(table: Table) -> None:
    for key in ("drift_colour_face", "drift_colour_background"):
        assert (table["drifting"][key] > 2 * table["truth"][key] + 10).all()
