"""Scoring: every bad video has a row with its name, and the face measures rank as they must."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.media.writer import VideoWriter
from bench import report
from bench.quality import identity, score
from bench.quality.__main__ import main, table
from bench.quality.cases import CASES, Source, read_case
from bench.quality.clip import Case, Clip, Faces
from bench.quality.context import Context
from bench.quality.embedders import DlibEmbedder, OnnxEmbedder, available, similarity_transform
from bench.quality.faces import find_faces
from bench.quality.measure import Measure

needs_dlib = pytest.mark.skipif(available() is not None, reason=str(available()))


class Stub:
    """A module of measures that costs nothing: mean grey level, and a refusal of what is too dark."""

    MEASURES = (Measure("grey", "Mean grey level", "", "target", "visual", 128),)

    @staticmethod
    def measure(case: Case, video: Clip, faces: Faces, context: Context) -> dict[str, float]:
        if (grey := float(video.frames.mean())) < 5:
            raise InputError(f"{case.name}: too dark to be measured")
        return {"grey": math.nan if case.name == "case-02" else grey}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "modules", lambda: ({"stub": Stub}, {"sync": "it is not here"}))


def save(path: Path, frames: np.ndarray, sound: np.ndarray | None) -> None:
    with VideoWriter(path, frames.shape[1:3], audio=None if sound is None else (sound, 16_000)) as file:  # type: ignore[arg-type]
        file.write(frames)


def test_every_bad_video_is_a_named_row(tmp_path: Path, stub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten cases, one thing wrong with each but two: ten rows, and means of the two that are counted."""
    cases, videos = tmp_path / "cases", tmp_path / "peer"
    videos.mkdir()
    for i in range(10):
        shutil.copytree(CASES / f"case-{i:02d}", cases / f"case-{i:02d}")
    first = read_case(CASES / "case-00")
    assert first.target is not None
    good, sound = first.target.frames, first.speech
    names = [f"case-{i:02d}" for i in range(10)]
    for i in (0, 2):  # the stub gives case 2 no value
        save(videos / f"{names[i]}.mp4", good, sound)
    save(videos / f"{names[1]}.mp4", np.full_like(good, 127), sound)
    (videos / f"{names[3]}.mp4").write_bytes(b"not a video")
    save(videos / f"{names[4]}.mp4", good, None)
    save(videos / f"{names[5]}.mp4", good[:90], sound)
    (videos / f"{names[6]}.refused.txt").write_text("no face was found in it\n")
    save(videos / f"{names[8]}.mp4", good, sound)
    (cases / names[8] / "truth.npz").unlink()
    dark = find_faces(good)
    monkeypatch.setattr(score, "find_faces", lambda f: dark if f.mean() < 5 else find_faces(f))
    save(videos / f"{names[9]}.mp4", np.zeros_like(good), sound)

    sources = [Source(cases / name) for name in names]
    rows = score.score(sources, [score.System("peer", videos)], Context())
    assert [(r["system"], r["case"]) for r in rows] == [("peer", name) for name in names]
    assert [r["status"] for r in rows] == [
        "ok", "no_face", "ok", "unreadable", "no_sound", "wrong_length", "refused", "missing", "bad_case",
        "not_measured",
    ]  # fmt: skip
    assert {r["status"] for r in rows} <= {"ok", *score.PROBLEMS}
    assert all(r["reason"] and "\n" not in r["reason"] for r in rows if r["status"] != "ok")
    assert rows[6]["reason"] == "no face was found in it" and "expected 101 frames, got 90" in rows[5]["reason"]
    assert all(math.isnan(r["grey"]) for r in rows if r["status"] != "ok")
    found = score.means(rows)["peer"]
    assert found["cases"] == 10 and found["scored"] == 2 and sum(found["problems"].values()) == 8
    assert found["mean"]["grey"] == pytest.approx(rows[0]["grey"]) and found["unmeasured"] == {"grey": 1}
    monkeypatch.setattr("bench.quality.__main__.measures", lambda: Stub.MEASURES)
    said = "\n".join(table(score.means(rows)))
    assert "2 of 10 cases scored; not: 1 bad_case, 1 missing, 1 refused, 1 unreadable" in said
    assert "grey: not measured in 1 of them" in said
    score.write_csv(tmp_path / "rows.csv", rows)
    kept = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(kept) == 10 and kept[1]["grey"] == "nan" and kept[7]["status"] == "missing"


def test_a_little_longer_is_cut_and_much_longer_is_not() -> None:
    case = read_case(CASES / "case-00", 1)
    assert case.target is not None
    frames = case.target.frames
    longer = np.concatenate([frames, frames[-2:]])
    assert len(score.check(case, Clip(longer, case.speech))[0].frames) == 101
    with pytest.raises(score.Unscored, match="wrong_length"):
        score.check(case, Clip(np.concatenate([longer, frames[:1]]), case.speech))


def test_a_real_case_without_a_target_has_no_degraded_row_with_figures(stub: None) -> None:
    case = read_case(CASES / "case-00", 1)
    silent = Case(case.name, "real", case.identity, case.reference, case.speech)
    row = score.score_video(score.System("frozen"), silent, None, Context())
    assert row["status"] == "no_target" and math.isnan(row["grey"])


def test_auc_is_the_chance_that_same_beats_different() -> None:
    assert identity.auc(np.array([0.9, 0.8]), np.array([0.1, 0.2, 0.3])) == 1
    assert identity.auc(np.array([0.1]), np.array([0.2, 0.3])) == 0
    assert identity.auc(np.array([0.2, 0.4]), np.array([0.3, 0.2])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert math.isnan(identity.auc(np.zeros(0), np.ones(3)))
    a, b = np.random.default_rng(0).normal(size=(2, 4000))
    assert identity.auc(a, b) == pytest.approx(0.5, abs=0.03)


def test_similarity_cuts_a_tenth_at_each_end() -> None:
    """Ten frames, nine alike and one elsewhere: one is cut below and one above."""
    reference = np.array([1.0, 0.0])
    frames = np.stack([[np.cos(t), np.sin(t)] for t in (0.0, *[0.1] * 8, 3.0)])
    assert identity.similarity(frames, reference) == pytest.approx(np.cos(0.1))
    assert identity.similarity(frames[:9], reference) < 1  # nine frames: none is cut


def test_people_who_share_a_face_do_not_count_as_others() -> None:
    v = np.eye(3)[:, None]
    found = identity.separation(list(v), list(v), ["a", "b", "c"])
    assert found["auc"] == 1 and found["top1"] == 1
    assert identity.separation(list(v), list(v[[1, 0, 2]]), ["a", "a", "c"])["people"] == 2
    crossed = identity.separation(list(v), list(v[[1, 2, 0]]), ["a", "b", "c"])
    assert crossed["auc"] < 0.5 and crossed["top1"] == 0


@needs_dlib
def test_face_measures_rank_own_above_blurred_above_another_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "modules", lambda: ({"identity": identity}, {}))
    monkeypatch.setattr(identity, "FRAMES", 4)  # at 0.2 s each
    sources = [Source(CASES / name, seconds=2) for name in ("case-00", "case-05")]
    systems = [score.System(n) for n in ("truth", "blurred", "other")]
    rows = {(r["system"], r["case"]): r for r in score.score(sources, systems, Context())}
    assert len(rows) == 6 and all(r["status"] == "ok" for r in rows.values())
    for case in ("case-00", "case-05"):
        own, blurred, other = (rows[s.name, case] for s in systems)
        assert own["identity"] > blurred["identity"] > other["identity"]
        assert own["identity_margin"] > 0 > other["identity_margin"]
        assert own["identity_top1"] == 1 and other["identity_top1"] == 0
        assert own["identity_worst"] <= own["identity"] <= own["identity_template"] <= 1 and own["face_missed"] == 0
        assert own["identity_template"] > max(blurred["identity_template"], other["identity_template"])


@needs_dlib
def test_embedding_tells_rendered_people_apart_across_places() -> None:
    """Nine people, two frames of each video: the whole set with more frames is the command's business."""
    embedder, pairs = DlibEmbedder(), ([], [])
    cases = [read_case(CASES / f"case-{i:02d}", 1) for i in range(9)]
    for case in cases:
        assert case.target is not None
        for part, frames in zip(pairs, (case.reference.frames[::25], case.target.frames[::100]), strict=True):
            part.append(identity.embed(frames, find_faces(frames, fps=1), embedder))
    people = [c.identity for c in cases]
    assert identity.separation(*pairs, people)["auc"] >= 0.99
    assert identity.separation(pairs[0], pairs[1][1:] + pairs[1][:1], people)["auc"] < 0.7


def test_a_similarity_transform_is_found_again() -> None:
    points = np.random.default_rng(0).normal(size=(5, 2))
    turn = np.array([[0.8, -0.6, 3.0], [0.6, 0.8, -1.0]]) * np.array([2, 2, 1])
    np.testing.assert_allclose(similarity_transform(points, points @ turn[:, :2].T + turn[:, 2]), turn, atol=1e-12)


def test_an_onnx_face_model_is_run_or_refused(tmp_path: Path) -> None:
    """A model that averages each quarter of the aligned face stands in for one that knows faces."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    if (reason := available()) is not None:
        pytest.skip(reason)
    with pytest.raises(InputError, match="no such file"):
        OnnxEmbedder(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(Exception, match="expected an ONNX face model"):
        OnnxEmbedder(tmp_path / "bad.onnx")
    from onnx import TensorProto, helper

    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[56, 56], strides=[56, 56])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, s, s]) for n, s in (("x", 112), ("y", 2))]
    graph = helper.make_graph([node], "quarters", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "quarters.onnx")
    embedder = OnnxEmbedder(tmp_path / "quarters.onnx")
    case = read_case(CASES / "case-00", 1)
    found = identity.embed(case.reference.frames, find_faces(case.reference.frames), embedder, 3)
    assert embedder.name == "quarters" and found.shape == (3, 12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    np.testing.assert_array_equal(
        found, identity.embed(case.reference.frames, find_faces(case.reference.frames), embedder, 3)
    )


def test_an_onnx_model_without_its_runtime_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="onnxruntime is not installed"):
        OnnxEmbedder(tmp_path / "face.onnx")


def test_the_command_scores_a_folder(tmp_path: Path, stub: None, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for module in ("score", "__main__"):
        monkeypatch.setattr(f"bench.quality.{module}.measures", lambda: Stub.MEASURES)
    monkeypatch.setattr("bench.quality.__main__.modules", score.modules)
    (tmp_path / "mine").mkdir()
    case = read_case(CASES / "case-00", 1)
    assert case.target is not None
    save(tmp_path / "mine" / "case-00.mp4", case.target.frames, case.speech)
    given = ["--count", "2", "--videos", str(tmp_path / "mine"), "--workers", "1", "--out", str(tmp_path / "out")]
    if available() is not None:
        assert main(given) == 2
        return
    assert main([*given, "--versus", f"none={tmp_path}"]) == 0
    said = capsys.readouterr()
    last = json.loads(said.out.splitlines()[-1])
    assert last["set"] == "procedural" and last["systems"]["mine"]["problems"] == {"missing": 1}
    assert last["systems"]["none"] == {
        "cases": 2, "scored": 0, "problems": {"missing": 2}, "mean": {"grey": None}, "unmeasured": {},
    }  # fmt: skip
    assert (
        "sync is not measured: it is not here" in said.err and "mine: 1 of 2 cases scored; not: 1 missing" in said.out
    )
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 5
    assert main(["--videos", str(tmp_path / "nowhere")]) == 2 and main(["--count", "1"]) == 2
    assert "expected a folder of videos" in capsys.readouterr().err


def test_the_readme_names_what_no_mean_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    systems = {
        "truth": {"cases": 2, "scored": 2, "problems": {}, "mean": {"a": 0.9876, "b": 3.0}, "unmeasured": {}},
        "tiny": {"cases": 2, "scored": 1, "problems": {"no_face": 1}, "mean": {"a": 0.5, "b": None},
                 "unmeasured": {"b": 1}},
    }  # fmt: skip
    columns = [
        vars(Measure("a", "Likeness", "", "higher", "identity")),
        vars(Measure("b", "Lag", "s", "target", "sync")),
    ]
    result = {"set": "procedural", "cases": 2, "embedder": "dlib", "weights": "abc", "seconds": 9.0, "workers": 2,
              "not_here": {"drift": "it is not here"}, "systems": systems, "measures": columns}  # fmt: skip
    report.store("quality", json.dumps(result))
    assert "| measure | better | truth | tiny |" in report.quality_page()
    assert "| measure | better | truth, 2 procedural | tiny, 2 procedural |" in report.section()
    for text in (report.section(), report.quality_page()):
        assert "| Likeness | higher | 0.988 | 0.5 |" in text and "| Lag, s | 0 | 3 | n/a |" in text
        assert "truth 2 of 2; tiny 1 of 2 (1 no_face)" in text and "drift (it is not here)" in text
