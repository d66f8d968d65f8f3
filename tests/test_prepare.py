"""Real videos into shards, with rendered people in their place; and the graph that says who is who."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset", reason="the data extras are not installed: webdataset")
pytest.importorskip("scenedetect", reason="the data extras are not installed: scenedetect-headless")

from conftest import ROOT
from test_shards import CFG, _Here, make_weights

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.errors import ArtifactError, InputError, UnsupportedError
from avatar_rt.media.reader import VideoClip, read_video
from avatar_rt.media.writer import VideoWriter
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.sync import SyncNetwork
from avatar_rt.models.weights import load_weights
from training.data import prepare as program
from training.data import stages
from training.data.pairs import describe_place, identity_graph, identity_of, pair_corpus, place_similarity
from training.data.shards import FOLDER, read_index, read_shard
from training.data.stages import Clip, Rejected, Rules, Shot
from training.data.table import Table

RULES = Rules(frames=45)
SYNC = ROOT / "bench" / "quality" / "weights" / "sync.safetensors"


@cache
def person(case: int, kind: str = "target") -> VideoClip:
    return read_video(ROOT / "tests" / "data" / "cases" / f"case-{case:02d}" / f"{kind}.mp4")


def write(path: Path, frames: np.ndarray, sound: np.ndarray | None) -> Path:
    with VideoWriter(path, frames.shape[1:3], audio=None if sound is None else (sound, 16_000)) as writer:
        writer.write(np.ascontiguousarray(frames))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people after each other; one with the sound four frames late; two at once; a mute one; a broken file."""
    folder = tmp_path_factory.mktemp("videos")
    a, b, c = person(0), person(1), person(2, "reference")
    two = np.concatenate([a.frames[:61], b.frames[:61]])
    write(folder / "a-two.mp4", two, np.concatenate([a.audio[: 61 * 640], b.audio[: 61 * 640]]))
    late = np.concatenate([np.zeros(4 * SAMPLES_PER_FRAME, np.float32), c.audio[: 177 * 640]])
    (folder / "deeper").mkdir()
    write(folder / "deeper" / "late.mp4", c.frames[:181], late)
    write(folder / "crowd.mp4", np.concatenate([a.frames[:50], b.frames[:50]], axis=2), a.audio[: 50 * 640])
    write(folder / "mute.mp4", b.frames[:50], None)
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("w") / "weights")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = type("Pool", (_Here,), {"imap": lambda self, call, items: map(call, items)})
    monkeypatch.setattr(program.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": pool}))


def face_colours() -> stages.Embedder:
    """A few colours in place of a face network: they tell the rendered people apart."""

    def embed(crop: np.ndarray, box: np.ndarray) -> np.ndarray:
        colours = crop.reshape(4, 4, 4, 4, 3).mean((1, 3)).reshape(-1) - 110.0
        return colours / np.linalg.norm(colours)

    return embed


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_stretch_is_a_clip_or_has_a_reason(videos: Path, weights: Path, tmp_path: Path) -> None:
    counts = program.prepare(videos, tmp_path, weights, rules=RULES, files_per_shard=2)
    rows = rows_of(tmp_path)
    assert counts == {"kept": 6, "rejected by read": 1, "rejected by segment": 6, "rejected by cut": 1}
    assert sum(counts.values()) == len(rows)
    told = {(r["source"], int(r["first"])): (r["outcome"], r["reason"]) for r in rows}
    assert told["a-two.mp4", 0][0] == told["a-two.mp4", 61][0] == "kept"  # the cut between two people is seen
    assert "0.64 s are left of the shot" in told["a-two.mp4", 45][1]
    assert [told["deeper/late.mp4", 45 * k][0] for k in range(4)] == ["kept"] * 4
    assert told["crowd.mp4", 0][1] == "another face is in the picture"
    assert told["mute.mp4", 0][1] == "the video has no sound"
    assert "broken.mp4" in told["broken.mp4", 0][1]
    index = read_index(tmp_path / FOLDER, weights)
    samples = [s for shard in index.shards for s in read_shard(tmp_path / FOLDER, shard)]
    assert {s.key for s in samples} == {r["key"] for r in rows if r["outcome"] == "kept"}
    for sample in samples:
        assert sample.latents.shape == (12, 4, 4, 4) and sample.speech.shape == (45, 6)
        assert np.isfinite(sample.motion).all() and np.isnan(sample.mouth).all()
        middle = (sample.facebox[:, :2] + sample.facebox[:, 2:]).mean(0) / 2
        np.testing.assert_allclose(middle, 8, atol=0.5)  # in the crop's pixels
    assert not list(tmp_path.rglob(".*"))  # nothing is left half-written


def test_a_second_run_does_what_is_missing(videos: Path, weights: Path, tmp_path: Path) -> None:
    new = tmp_path / "videos"
    new.mkdir()
    (new / "a.mp4").write_bytes((videos / "a-two.mp4").read_bytes())
    (new / "b.mp4").write_bytes((videos / "broken.mp4").read_bytes())
    out = tmp_path / "out"
    program.prepare(new, out, weights, rules=RULES)
    first = (out / FOLDER / "clips-00000.tar").read_bytes()
    (new / "c.mp4").write_bytes((videos / "mute.mp4").read_bytes())
    seen: list[str] = []
    whole = program.clips_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "clips_of", lambda path, *rest: seen.append(path.name) or whole(path, *rest))
        counts = program.prepare(new, out, weights, rules=RULES)
        assert seen == ["c.mp4"] and counts["kept"] == 2 and counts["rejected by cut"] == 1
        (out / "report" / "clips-00000.csv").unlink()  # as if broken off before the report was written
        program.prepare(new, out, weights, rules=RULES)
    assert seen == ["c.mp4", "a.mp4", "b.mp4"] and len(rows_of(out)) == 7
    (again,) = (out / FOLDER).glob("*.tar")
    assert [s.name for s in read_index(out / FOLDER).shards] == [again.name] == ["clips-00002.tar"]
    assert again.read_bytes() == first  # the same clips, bit for bit
    other = make_weights(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="encoded by other weights"):
        program.prepare(new, out, other, rules=RULES)
    with pytest.raises(InputError, match=r"expected 45 as the clips of .* have, got 49"):
        program.prepare(new, out, weights, rules=Rules(frames=49))


def test_what_cannot_be_is_said(videos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match=r"expected videos .* found none"):
        program.prepare(tmp_path, tmp_path / "out", weights)
    with pytest.raises(InputError, match=r"frames: expected 1 \+ 4k, at least 5, got 44"):
        program.prepare(videos, tmp_path / "out", weights, rules=Rules(frames=44))
    with pytest.raises(ArtifactError, match=r"nowhere.*expected weights"):
        program.prepare(videos, tmp_path / "out", weights, sync=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"embedder: expected MODULE:FUNCTION .*, got 'nothing:here'"):
        program.prepare(videos, tmp_path / "out", weights, embedder="nothing:here")
    with pytest.raises(UnsupportedError, match="expected a configuration of equal height and width, got 16 and 32"):
        program.square_side(type(CFG)(**{**CFG.__dict__, "width": 32}))
    assert not (tmp_path / "out").exists()
    call = ["--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--weights", str(weights)]
    assert program.main(call) == 2 and "found none" in capsys.readouterr().err


def clips_with_sound(path: Path) -> list[Clip | Rejected]:
    shots = [s for s in stages.survey(path, RULES) if isinstance(s, Shot)]
    found = [s for t in stages.follow(shots, RULES) for s in stages.segment(t, RULES)]
    return list(stages.cut([s for s in found if isinstance(s, stages.Segment)], 128, RULES))


def test_a_late_sound_is_found_moved_and_recorded(videos: Path, tmp_path: Path) -> None:
    network = SyncNetwork().eval()
    load_weights(network, SYNC, dtype=torch.float32)
    late = [c for c in clips_with_sound(videos / "deeper" / "late.mp4") if isinstance(c, Clip)]
    right = write(
        tmp_path / "right.mp4", person(2, "reference").frames[:181], person(2, "reference").audio[: 181 * 640]
    )
    true = [c for c in clips_with_sound(right) if isinstance(c, Clip)]
    found = [stages.check_sync(clips, network, RULES) for clips in (true, late)]
    offsets = [{c.offset for c in clips if isinstance(c, Clip)} for clips in found]
    assert [len(o) for o in offsets] == [1, 1] and offsets[1].pop() - offsets[0].pop() == 4
    for before, after in zip(late, found[1], strict=True):
        assert isinstance(after, Clip) and after.moved == after.offset
        kept = SAMPLES_PER_FRAME * (45 - after.moved)
        np.testing.assert_array_equal(after.sound[:kept], before.sound[-kept:])
    strict = Rules(frames=45, realign=3)
    assert all("frames late" in r.reason for r in stages.check_sync(late, network, strict))  # type: ignore[union-attr]
    unsure = stages.check_sync(late, network, Rules(frames=45, confidence=9.0))
    assert all("no offset stands out" in r.reason for r in unsure)  # type: ignore[union-attr]
    groups = list(stages.together([*late, *late], most=3))
    assert [len(g) for g in groups] == [3, 3, 2]


def test_persons_and_pairs_of_a_graph() -> None:
    faces = np.eye(3, 8, dtype=np.float32)[[0, 0, 0, 1, 1, 2]]
    room, street = np.zeros(96, np.float32), np.full(96, 60, np.float32)
    places = np.stack([room, street, room, room, street, street])
    seconds = np.array([3, 3, 3, 3, 1, 3.0])
    graph = identity_graph(faces, places, seconds)
    assert graph.person.tolist() == [0, 0, 0, 3, 3, 5]
    assert graph.edges == ((0, 1), (1, 2))  # 0 and 2 are in one room; 4 is too short
    assert identity_graph(faces, places, seconds, min_seconds=0.5).edges == ((0, 1), (1, 2), (3, 4))
    assert identity_graph(faces, places, seconds, place_max=1.0).edges == ((0, 1), (0, 2), (1, 2))
    assert identity_graph(faces, places, seconds, face_min=1.1).edges == ()
    with pytest.raises(InputError, match="identity_graph: expected faces"):
        identity_graph(faces, places[:2], seconds)


def test_a_place_is_what_is_behind() -> None:
    rng = np.random.default_rng(0)
    box = np.array([60, 30, 100, 80])
    room, street = (rng.integers(0, 255, (12, 16, 3), np.uint8).repeat(10, 0).repeat(10, 1) for _ in range(2))
    again = room.copy()
    again[30:80, 60:100] = 200  # another face
    again[90:, 50:110] = 20  # another coat
    here, same, other = (describe_place(p, box) for p in (room, again, street))
    assert place_similarity(here, same) > 0.95 and place_similarity(here, other) < 0.5
    nothing = describe_place(room, np.array([0, 0, 160, 120]))
    assert np.isnan(nothing).all() and place_similarity(here, nothing) == 1.0  # unknown is no other place


def test_pairs_move_together_and_the_table_finds_them(videos: Path, weights: Path, tmp_path: Path) -> None:
    program.prepare(videos, tmp_path, weights, rules=RULES, files_per_shard=1, embedder=f"{__name__}:face_colours")
    before = {s.key: s for shard in read_index(tmp_path / FOLDER).shards for s in read_shard(tmp_path / FOLDER, shard)}
    assert not any(any(s.paired) for s in read_index(tmp_path / FOLDER).shards)
    graph = pair_corpus(tmp_path, face_min=0.95, place_max=1.0, min_seconds=1.0)
    index = read_index(tmp_path / FOLDER, weights)
    after = [s for shard in index.shards for s in read_shard(tmp_path / FOLDER, shard)]
    assert {s.key for s in after} == set(before) and len(index.shards) == 1
    for sample in after:
        np.testing.assert_array_equal(sample.latents, before[sample.key].latents)
    table = Table(tmp_path, MotionEncoder(CFG.motion), 8)
    late = [i for i, m in enumerate(table.meta) if m["source"] == "deeper/late.mp4"]
    assert len(late) == 4 and len({table.meta[i]["identity"] for i in late}) == 1
    assert all(set(table.siblings[i]) == set(late) - {i} for i in late)
    assert len({table.meta[i]["identity"] for i in range(6)}) == len(set(graph.person.tolist())) == 3
    assert len(table.train) + len(table.val) == 4 and sum(index.shards[0].paired) == 4
    assert identity_of("a") == identity_of("a") != identity_of("b")
    with pytest.raises(ArtifactError, match="holds no encoded clips"):
        pair_corpus(make_weights(tmp_path / "empty"))
