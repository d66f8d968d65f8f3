"""The cases: all there, whole, made again from their numbers; the manifest's refusals; faces in small pictures."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from avatar_rt.errors import InputError
from avatar_rt.media.reader import iter_frames
from avatar_rt.media.writer import VideoWriter
from bench.quality.cases import CASES, MANIFEST, STYLE_NAMES, procedural, read_case, read_manifest, real, real_sources
from bench.quality.degraded import degrade
from bench.quality.faces import crops, find_faces

HEAD = "file,sha1,identity,reference,target,speech,sync_lag,licence\n"


def test_thirty_six_people_each_in_two_places() -> None:
    paths = procedural()
    metas = [json.loads((p / "meta.json").read_text()) for p in paths]
    assert [p.name for p in paths] == [f"case-{i:02d}" for i in range(36)]
    assert len({m["identity"] for m in metas}) == 36 and min(m["identity"] for m in metas) >= 10_000_000
    for path, meta in zip(paths, metas, strict=True):
        scene, behind = (cv2.imread(str(path / n)).astype(int) for n in ("scene.png", "reference_background.jpg"))
        assert np.abs(scene - behind).mean() > 5, path.name
        assert meta["reference"]["sentence"] != meta["target"]["sentence"]
    assert sum(f.stat().st_size for f in CASES.rglob("*") if f.is_file()) < 9e6


def test_a_case_is_read_whole_and_its_reference_can_be_shorter() -> None:
    case = read_case(CASES / "case-03")
    assert case.kind == "procedural" and case.target is not None and case.scene is not None
    assert case.reference.frames.shape == (201, 128, 128, 3) and case.target.frames.shape == (101, 128, 128, 3)
    assert case.speech.shape == (101 * 640,) and case.target.sound is not None
    assert np.corrcoef(case.speech, case.target.sound)[0, 1] > 0.95  # the video's own sound is the speech
    shapes = {k: v.shape for k, v in case.truth.items()}
    assert shapes == {
        "motion": (101, 62), "mouth": (101,), "facebox": (101, 4), "style": (14,),
        "reference_background": (128, 128, 3),
    }  # fmt: skip
    style = json.loads((CASES / "case-03" / "meta.json").read_text())["style"]
    assert case.truth["style"][STYLE_NAMES.index("blink")] == pytest.approx(style["blink"])
    assert case.truth["style"][STYLE_NAMES.index("sway_roll")] == pytest.approx(style["sway"][2])
    for seconds in (1, 2, 4, 8):
        short = read_case(CASES / "case-03", seconds)
        assert len(short.reference.frames) == 25 * seconds + 1
        assert short.reference.sound is not None and len(short.reference.sound) == 640 * (25 * seconds + 1)
    with pytest.raises(InputError, match="up to 8"):
        read_case(CASES / "case-03", 9)


def test_a_damaged_case_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        procedural(tmp_path)
    for name, sentence in (("truth.npz", "truth.npz"), ("meta.json", "identity"), ("target.mp4", "target.mp4")):
        folder = tmp_path / name / "case-00"
        shutil.copytree(CASES / "case-00", folder)
        (folder / name).unlink()
        with pytest.raises(InputError, match=sentence):
            read_case(folder)
    folder = tmp_path / "case-00"
    shutil.copytree(CASES / "case-00", folder)
    shutil.copy(CASES / "case-01" / "reference.mp4", folder / "target.mp4")
    with pytest.raises(InputError, match="one length"):
        read_case(folder)


def test_every_reference_shows_a_face() -> None:
    for path in procedural():
        some = np.stack(list(iter_frames(path / "reference.mp4"))[::20])
        assert find_faces(some, fps=1.25).found.all(), path.name


def test_faces_are_where_the_truth_has_them_at_half_the_size_too() -> None:
    for path in procedural()[::3]:
        target = np.stack(list(iter_frames(path / "target.mp4"))[::20])
        boxes = np.load(path / "truth.npz")["facebox"].astype(np.float32)[::20]
        small = np.stack([cv2.resize(f, (64, 64), interpolation=cv2.INTER_AREA) for f in target])
        for frames, scale in ((target, 1), (small, 2)):
            faces = find_faces(frames, fps=1.25)
            assert faces.found.all(), path.name
            seen = faces.boxes * scale
            centre = (seen[:, :2] + seen[:, 2:]) / 2 - (boxes[:, :2] + boxes[:, 2:]) / 2
            assert np.abs(centre).mean() < 8, path.name  # of 128 pixels


def test_faces_are_counted_where_they_are_and_followed() -> None:
    clip = read_case(CASES / "case-00").target
    assert clip is not None
    frames = clip.frames[:12].copy()
    frames[4:7] = 127  # nobody there
    faces = find_faces(frames)
    assert faces.found.tolist() == [True] * 4 + [False] * 3 + [True] * 5
    whole = find_faces(clip.frames[:12])
    assert np.abs(faces.boxes - whole.boxes).max() < 6  # held where it was
    none = find_faces(np.full((3, 64, 64, 3), 127, np.uint8))
    assert not none.found.any() and none.boxes.shape == (3, 4)
    moved = find_faces(np.pad(clip.frames[:3], ((0, 0), (0, 0), (128, 0), (0, 0))))
    np.testing.assert_allclose(moved.boxes[:, 0], whole.boxes[0, 0] + 128, atol=8)
    square = crops(clip.frames[:3], find_faces(clip.frames[:3]), 96)
    assert square.shape == (3, 96, 96, 3)
    with pytest.raises(InputError, match="uint8"):
        find_faces(clip.frames[:2].astype(np.float32))


def test_degraded_copies_are_wrong_in_one_thing() -> None:
    case, another = read_case(CASES / "case-00", 1), read_case(CASES / "case-01", 1)
    assert case.target is not None and case.target.sound is not None and another.target is not None
    frames, sound = case.target.frames, case.target.sound
    made = {n: degrade(n, case, another) for n in ("truth", "frozen", "other", "shifted", "blurred", "drifting")}
    assert {len(v.frames) for v in made.values()} == {101}
    np.testing.assert_array_equal(made["frozen"].frames[100], frames[0])
    np.testing.assert_array_equal(made["other"].frames, another.target.frames)
    np.testing.assert_array_equal(made["other"].sound, sound)
    np.testing.assert_array_equal(made["shifted"].sound[6 * 640 :], sound[: -6 * 640])  # type: ignore[index]
    np.testing.assert_array_equal(made["shifted"].frames, frames)
    assert (
        np.abs(np.diff(made["blurred"].frames.astype(int), axis=2)).mean()
        < 0.8 * np.abs(np.diff(frames.astype(int), axis=2)).mean()
    )
    tint = made["drifting"].frames.astype(float).mean((1, 2)) - frames.astype(float).mean((1, 2))
    assert tint[100, 0] > 10 and tint[100, 2] < -10 and np.abs(tint[0]).max() < 1
    with pytest.raises(InputError, match="another person"):
        degrade("other", case, case)
    with pytest.raises(InputError, match="one of truth"):
        degrade("sharpened", case)


def test_the_manifest_names_files_parts_and_licences() -> None:
    rows = read_manifest(MANIFEST)
    assert len({r.file for r in rows}) == len(rows) == 19 and all(r.licence and len(r.sha1) >= 10 for r in rows)
    for row in rows:
        apart = row.reference[1] <= row.target[0]
        assert apart or row.reference == row.target  # never an overlap in part
        assert row.reference[1] - row.reference[0] <= 8


@pytest.mark.parametrize(
    "row", ["a.mp4,abc,me,0-3,3-1,own,,x", "a.mp4,abc,me,0-3,3-6,mine,,x", "a.mp4,abc", "a.mp4,abc,me,0,3-6,own,,x"]
)
def test_a_wrong_line_of_a_manifest_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "real.csv").write_text(f"{HEAD}{row}\n")
    with pytest.raises(InputError, match="line 2"):
        read_manifest(tmp_path / "real.csv")


def test_a_real_clip_is_cut_or_refused_with_its_sentence(tmp_path: Path) -> None:
    """A rendered person stands in for a real one: what is tested is the manifest."""
    clip = read_case(CASES / "case-00").reference
    assert clip.sound is not None
    with VideoWriter(tmp_path / "a.mp4", (128, 128), audio=(clip.sound, 16_000)) as file:
        file.write(clip.frames[:60])
    with VideoWriter(tmp_path / "grey.mp4", (128, 128), audio=(clip.sound, 16_000)) as file:
        file.write(np.full_like(clip.frames[:50], 127))
    sha1 = {n: hashlib.sha1((tmp_path / n).read_bytes()).hexdigest()[:12] for n in ("a.mp4", "grey.mp4")}
    lines = [
        f"a.mp4,{sha1['a.mp4']},me,0-1,1-2,own,0,none",
        f"a.mp4,{sha1['a.mp4']},me,0-1,1-2,other,,none",
        f"a.mp4,{sha1['a.mp4'][::-1]},me,0-1,1-2,own,0,none",
        f"a.mp4,{sha1['a.mp4']},me,0-1,20-24,own,0,none",
        "gone.mp4,0123456789ab,me,0-1,1-2,own,0,none",
        f"grey.mp4,{sha1['grey.mp4']},me,0-1,1-2,own,0,none",
    ]
    manifest = tmp_path / "real.csv"
    manifest.write_text(HEAD + "\n".join(lines) + "\n")
    sources = real_sources(manifest, tmp_path)
    case = sources[0].read()
    assert case.kind == "real" and case.identity == "me" and case.target is not None and not case.truth
    assert case.reference.frames.shape == (25, 256, 256, 3) and case.target.frames.shape == (25, 256, 256, 3)
    np.testing.assert_array_equal(case.speech, case.target.sound)
    assert case.scene is not None and case.reference.sound is not None and len(case.reference.sound) == 16_000
    sentences = ["no speech of its own", "SHA-1", "expected 24 s", "not in", "no face"]
    for source, sentence in zip(sources[1:], sentences, strict=True):
        with pytest.raises(InputError, match=sentence):
            source.read()
    voiced = real_sources(manifest, tmp_path, speech=CASES / "case-05")[1].read()
    assert voiced.target is None and len(voiced.speech) == 16_000
    with pytest.raises(InputError, match="folder of the clips"):
        real_sources(manifest, tmp_path / "none")
    manifest.write_text(f"{HEAD}{lines[0]}\n")
    assert [c.name for c in real(manifest, tmp_path)] == ["a"]


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("numba", "anny", "soundfile")) or not shutil.which("espeak-ng"),
    reason="the training extras or espeak-ng are not installed",
)
def test_a_case_is_made_again_from_its_number() -> None:
    """Not bit by bit, for encoders differ: the pictures within the codec's loss, the truth within its rounding."""
    from training.data.cases import case_identities, render_case
    from training.data.speech import Speaker

    case = read_case(CASES / "case-00")
    meta = json.loads((CASES / "case-00" / "meta.json").read_text())
    identity = case_identities(1)[0]
    speaker = Speaker()
    try:
        _, target = render_case(speaker, identity)
    finally:
        speaker.close()
    assert str(identity) == case.identity and target.meta["sentence"] == meta["target"]["sentence"]
    for name in ("motion", "mouth", "facebox"):
        np.testing.assert_allclose(getattr(target, name), case.truth[name], rtol=2e-3, atol=2e-3)
    assert case.target is not None
    error = np.mean((target.frames.astype(np.float32) - case.target.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    np.testing.assert_array_equal(target.background, case.scene)
