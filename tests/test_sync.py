"""Lip sync: the LSE arithmetic against brute force, SyncNet's front end against known values, and the shift test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.media.mouth import mouth_crops
from avatar_rt.models.sync import EMBEDDING, PIXELS
from bench.quality import lse, syncnet
from bench.quality.clip import Case, Clip, Faces
from bench.quality.scorer import WEIGHTS, SyncScorer
from bench.quality.sync import (
    MEASURES,
    case_clips,
    main,
    measure,
    real_clips,
    refusal,
    score_sync,
    score_syncnet,
    shift_sound,
    shift_test,
)  # fmt: skip
from training.methods import sync as training

CASES = Path(__file__).parent / "data" / "cases"
NUM_CASES = 6


@pytest.fixture(scope="module")
def scorer() -> SyncScorer:
    return SyncScorer()


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, Faces, np.ndarray, float]]:
    """frames, faces, sound, lead of the first cases."""
    clips = [clip for _, clip in zip(range(NUM_CASES), case_clips(CASES), strict=False)]
    return [(c.frames, c.faces(), c.sound, c.known) for c in clips]


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("AVATAR_RT_DATA")
    if not folder or not (Path(folder) / "clips.csv").is_file():
        pytest.skip("no real recordings on this machine: AVATAR_RT_DATA names no folder with clips.csv")
    return Path(folder)


# The arithmetic


@pytest.mark.parametrize("n", [1, 7, 40])
def test_distances_against_brute_force(n: int) -> None:
    video, sound = np.random.default_rng(n).normal(size=(2, n, 6)).astype(np.float32)
    table = lse.distances(video, sound, eps=1e-6)
    assert table.shape == (n, 31)
    for i in range(n):
        for j in range(31):
            at = i + j - 15
            other = sound[at].astype(float) if 0 <= at < n else np.zeros(6)
            assert table[i, j] == pytest.approx(np.linalg.norm(video[i] - other + 1e-6), rel=1e-9)


def test_distances_are_torch_pairwise_distance() -> None:
    video, sound = torch.randn(2, 20, 8)
    padded = torch.nn.functional.pad(sound, (0, 0, 15, 15))
    rows = [torch.nn.functional.pairwise_distance(video[[i]].repeat(31, 1), padded[i : i + 31]) for i in range(20)]
    np.testing.assert_allclose(lse.distances(video.numpy(), sound.numpy(), 1e-6), torch.stack(rows), rtol=1e-5)


def test_decide_by_hand() -> None:
    mean = np.linspace(5, 8, 31)  # median is the middle value, 6.5
    mean[18] = 2.0
    found = lse.decide(np.stack((mean - 1, mean + 1)))
    assert found.lse_d == pytest.approx(2)
    assert found.lse_c == pytest.approx(np.median(mean) - 2)
    assert found.late == 3  # the sound comes three frames after the picture; SyncNet's program prints -3


@pytest.mark.parametrize("late", [-15, -4, 0, 9])
def test_a_late_sound_is_positive(late: int) -> None:
    points = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    video, sound = points[40:80], points[40 - late : 80 - late]
    assert lse.decide(lse.distances(video, sound)).late == late


@pytest.mark.parametrize(
    ("frames", "samples", "windows"), [(100, 64000, 95), (100, 63999, 94), (80, 64000, 75), (5, 9999, 0), (3, 640, 0)]
)
def test_usable_windows(frames: int, samples: int, windows: int) -> None:
    assert lse.usable_windows(frames, samples) == windows


# SyncNet's front end and network


def test_mfcc_known_values() -> None:
    """Values of python_speech_features 0.6 for two decaying tones."""
    t = np.arange(3200) / 16000
    tones = 8000 * np.sin(2 * np.pi * 440 * t) * np.exp(-5 * t) + 1000 * np.sin(2 * np.pi * 2500 * t)
    found = syncnet.mfcc(tones.astype(np.int16))
    assert found.shape == (19, 13)
    first = [19.3563, 10.1251, -10.3926, 6.8876, -27.8841, -61.9413, -13.3186, -2.0361, -32.4027, 10.7233, 42.2343,
             1.1704, 1.1265]  # fmt: skip
    last = [18.3317, 6.67, -13.5253, 19.2506, -18.7661, -61.5118, -9.7528, 5.2016, -28.1177, 11.1911, 41.8684, 1.552,
            -0.2943]  # fmt: skip
    np.testing.assert_allclose(found[0], first, atol=1e-3)
    np.testing.assert_allclose(found[-1], last, atol=1e-3)
    assert np.isfinite(syncnet.mfcc(np.zeros(1000, np.int16))).all()
    frames = 75  # four MFCC frames a video frame, less one at the end; the last usable window needs no more
    assert len(syncnet.mfcc(np.zeros(frames * SAMPLES_PER_FRAME, np.int16))) == 4 * frames - 1


def test_median_filter_sees_zeros_beyond_the_ends() -> None:
    values = np.arange(1.0, 21.0)
    found = syncnet.median_filter(values)
    padded = np.concatenate((np.zeros(6), values, np.zeros(6)))
    assert found.tolist() == [float(np.median(padded[i : i + 13])) for i in range(20)]


def test_crop_rule() -> None:
    """A box of 40 x 60 about (100, 90): half 30, so 84 columns and 30 + 54 rows; what lies outside is grey 110."""
    frame = np.zeros((200, 200, 3), np.uint8)
    frame[..., 0] = np.arange(200)  # red tells the column
    frame[..., 2] = np.arange(200)[:, None]  # blue the row
    boxes = np.repeat(np.array([[80.0, 60, 120, 120]]), 30, 0)
    crop = syncnet.crops(np.repeat(frame[None], 30, 0), boxes)[15].astype(int)
    assert crop.shape == (224, 224, 3)
    assert abs(crop[112, 0, 2] - 58) <= 1 and abs(crop[112, -1, 2] - 141) <= 1  # BGR: red is last
    assert abs(crop[0, 112, 0] - 60) <= 1 and abs(crop[-1, 112, 0] - 143) <= 1
    edge = syncnet.crops(np.repeat(frame[None], 30, 0), boxes - 80)[15]
    assert (edge[0, 0] == 110).all()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("syncnet") / "syncnet_v2.model"
    torch.save(syncnet.SyncNet().state_dict(), path)
    return path


def test_syncnet_takes_the_published_names(untrained: Path) -> None:
    state = torch.load(untrained, weights_only=True)
    assert len(state) == 102
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["netcnnaud.0.weight"] == (64, 1, 3, 3) and shapes["netcnnaud.18.weight"] == (512, 256, 5, 4)
    assert shapes["netcnnlip.0.weight"] == (96, 3, 5, 7, 7) and shapes["netcnnlip.18.weight"] == (512, 256, 1, 6, 6)
    assert shapes["netfclip.3.weight"] == shapes["netfcaud.3.weight"] == (1024, 512)


def test_syncnet_scores_crops(untrained: Path) -> None:
    """Untrained, it knows nothing: but the numbers are finite, repeatable, and those of the definition."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (9, 224, 224, 3), dtype=np.uint8)
    sound = rng.normal(0, 0.1, 9 * 640).astype(np.float32)
    net = syncnet.SyncNetScorer(untrained)
    found = score_syncnet(frames, None, sound, net)
    assert found == score_syncnet(frames, None, sound, net)
    video, heard = net.points(frames, None, sound, 4)
    assert video.shape == heard.shape == (4, 1024)
    mean = [np.mean([np.linalg.norm(video[i] - (heard[i + o] if 0 <= i + o < 4 else 0) + 1e-6) for i in range(4)])
            for o in range(-15, 16)]  # fmt: skip
    assert found["lse_d"] == pytest.approx(min(mean), rel=1e-5)
    assert found["lse_c"] == pytest.approx(np.median(mean) - min(mean), abs=1e-5)
    assert found["offset"] == 15 - int(np.argmin(mean))


def test_syncnet_refuses_other_weights(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        syncnet.SyncNetScorer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not weights")
    with pytest.raises(ArtifactError, match="cannot be read"):
        syncnet.SyncNetScorer(tmp_path / "text.model")
    state = syncnet.SyncNet().state_dict()
    state["netfcaud.3.weight"] = torch.zeros(512, 512)
    torch.save(state, tmp_path / "other.model")
    with pytest.raises(ArtifactError, match=r"netfcaud\.3\.weight, expected \(1024, 512\), got \(512, 512\)"):
        syncnet.SyncNetScorer(tmp_path / "other.model")


def test_syncnet_golden_value() -> None:
    """The published program's check; AVATAR_RT_SYNCNET names a folder with syncnet_v2.model and example.avi."""
    folder = Path(os.environ.get("AVATAR_RT_SYNCNET", "-"))
    if not (folder / "syncnet_v2.model").is_file() or not (folder / "example.avi").is_file():
        pytest.skip("no SyncNet weights: AVATAR_RT_SYNCNET names no folder with syncnet_v2.model and example.avi")
    from avatar_rt.media.reader import read_video

    clip = read_video(folder / "example.avi")
    assert clip.audio is not None
    net = syncnet.SyncNetScorer(folder / "syncnet_v2.model")
    found = score_syncnet(clip.frames, None, clip.audio, net)
    assert found["offset"] == 3
    assert found["lse_d"] == pytest.approx(5.353, abs=0.02) and found["lse_c"] == pytest.approx(10.021, abs=0.02)


# Training


class Marked:
    """A corpus of one clip whose frame and sample numbers can be read off; its mouth leads by two frames."""

    meta = [{"style": {"lead": 0.08}, "voice": "none"}]  # noqa: RUF012
    identity = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return 1

    def frames(self, clip: int) -> np.ndarray:
        return np.repeat(np.arange(77, dtype=np.uint8), 32 * 32 * 3).reshape(77, 32, 32, 3)

    def audio(self, clip: int) -> np.ndarray:
        return (np.arange(77 * SAMPLES_PER_FRAME) // SAMPLES_PER_FRAME).astype(np.int16)

    def facebox(self, clip: int) -> np.ndarray:
        return np.tile(np.array([8, 4, 24, 28], np.float32), (77, 1))

    def mouth(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.float32)

    def motion(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.zeros((count, 62), np.float32)


def test_training_draws_the_offset_that_it_says() -> None:
    """Picture and sound of a draw are ``late`` frames apart, once the sound is as early as the mouth."""
    method = training.SyncMethod([Marked()], [Marked()], odds=[1.0], batch=2)
    generator = torch.Generator().manual_seed(0)
    seen_offsets = set()
    for _ in range(40):
        mouths, wave, heard, seen, late = method._draw(generator)
        assert mouths.shape == (training.LENGTH, PIXELS, PIXELS)
        first = float(mouths[0].mean())  # frame number, whatever the crop
        assert first == pytest.approx(float(seen[0, 0]), abs=0.5) and float(seen[0, 0] - heard[0, 0]) == int(late)
        assert round(float(wave[0]) * 32768) == float(heard[0, 0]) + 2 or float(heard[0, 0]) >= 75
        seen_offsets.add(int(late))
    assert min(seen_offsets) < -8 and max(seen_offsets) > 8
    values = method.step(0, generator)
    assert torch.isfinite(values["loss"])


def test_training_measures_as_the_protocol_does() -> None:
    video, sound = torch.randn(2, 3, 30, 8)
    found = training.offset_distances(video, sound)
    for row in range(3):
        wanted = lse.distances(video[row].numpy(), sound[row].numpy())
        np.testing.assert_allclose(found[row], wanted, atol=1e-4)


# Our own scorer


def test_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert {"data", "steps", "commit", "figures"} <= card.keys()


def test_mouth_crops_do_not_depend_on_the_size() -> None:
    """The same face in a picture twice as large gives the same crop, but for sampling."""
    rng = np.random.default_rng(0)
    import cv2

    small = cv2.GaussianBlur(rng.integers(0, 255, (80, 80, 3), dtype=np.uint8), (0, 0), 4)
    large = cv2.resize(small, (160, 160), interpolation=cv2.INTER_LINEAR)
    box = np.array([[20.0, 10, 60, 60]])
    a, b = mouth_crops(small[None], box, PIXELS), mouth_crops(large[None], 2 * box, PIXELS)
    assert a.shape == (1, PIXELS, PIXELS)
    assert np.abs(a - b).mean() < 1.5 < a.std()


def test_points_belong_to_windows(scorer: SyncScorer) -> None:
    """A window sees its five frames and the clip's mean, no more."""
    mouths = np.random.default_rng(0).uniform(0, 255, (30, PIXELS, PIXELS)).astype(np.float32)
    changed = mouths.copy()
    changed[15], changed[16] = mouths[16], mouths[15]  # the mean stays
    a, b = scorer.picture(mouths), scorer.picture(changed)
    assert a.shape == (26, EMBEDDING)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    differs = np.abs(a - b).max(1) > 1e-4 * np.abs(a).max()
    assert differs[11:17].all() and not differs[:11].any() and not differs[17:].any()


def test_shift_sound() -> None:
    sound = np.arange(1.0, 7.0)
    assert shift_sound(sound, 2).tolist() == [0, 0, 1, 2, 3, 4]
    assert shift_sound(sound, -2).tolist() == [3, 4, 5, 6, 0, 0]
    assert shift_sound(sound, 9).tolist() == [0] * 6


def test_shifts_of_procedural_clips_are_found(scorer: SyncScorer, cases: list) -> None:
    errors = [shift_test(scorer, frames, faces.boxes, sound, lead) for frames, faces, sound, lead in cases]
    assert np.mean(np.abs(errors) <= 1) >= 0.95


def test_scores_fall_with_the_sync(scorer: SyncScorer, cases: list) -> None:
    """True sound beats another's sound and a frozen picture; six frames of shift are seen as six."""
    own, other, frozen = [], [], []
    for i, (frames, faces, sound, _) in enumerate(cases):
        own.append(score_sync(frames, faces, sound, scorer))
        other.append(score_sync(frames, faces, cases[i - 1][2], scorer))
        frozen.append(score_sync(np.repeat(frames[:1], len(frames), 0), faces, sound, scorer))
        late = score_sync(frames, faces, shift_sound(sound, 6 * SAMPLES_PER_FRAME), scorer)
        assert abs(late["offset_star"] - own[-1]["offset_star"] - 6) <= 1
    mean = [np.mean([s["lse_c_star"] for s in part]) for part in (own, other, frozen)]
    assert mean[0] > 1.5 * mean[1] and mean[0] > 1.5 * mean[2]
    near = [np.mean([s["lse_d_star"] for s in part]) for part in (own, other, frozen)]
    assert near[0] < 0.85 * near[1] and near[0] < 0.85 * near[2]
    assert score_sync(*cases[0][:3], scorer) == own[0]  # bit for bit


def test_offset_counts_from_the_true_lead(scorer: SyncScorer, cases: list) -> None:
    frames, faces, sound, _ = cases[0]
    style = np.zeros(14, np.float32)
    style[1] = 0.08
    clip = Clip(frames, sound)
    context = type("Context", (), {"sync": scorer, "series": {}})()
    plain = score_sync(frames, faces, sound, scorer)
    for kind, truth, lead in (("procedural", {"style": style}, 2.0), ("procedural", {}, 2.125), ("real", {}, 0.0)):
        case = Case("case", kind, "a", clip, sound, None, clip, truth)
        found = measure(case, clip, faces, context)
        assert set(found) == {m.key for m in MEASURES}
        assert found["offset_star"] == pytest.approx(plain["offset_star"] - lead, abs=1e-5)


def test_what_cannot_be_scored_is_nan_with_a_reason(scorer: SyncScorer, cases: list) -> None:
    frames, faces, sound, _ = cases[0]
    hidden = Faces(faces.boxes, np.arange(len(frames)) < 20)
    bad = {
        "no sound": (frames, faces, None),
        "silent": (frames, faces, np.zeros_like(sound)),
        "too short: expected 3 s": (frames[:70], Faces(faces.boxes[:70], faces.found[:70]), sound),
        "too short": (frames, faces, sound[: 60 * SAMPLES_PER_FRAME]),
        f"no face was found in {len(frames) - 20}": (frames, hidden, sound),
    }
    for reason, clip in bad.items():
        assert reason in str(refusal(*clip))
        assert all(np.isnan(v) for v in score_sync(*clip, scorer).values())
    assert refusal(frames, faces, sound) is None
    with pytest.raises(InputError, match="boxes"):
        scorer.points(frames, faces.boxes[:3], sound)


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--corpus", str(tmp_path)]) == 2
    assert "expected a corpus" in capsys.readouterr().err
    assert main(["--cases", str(tmp_path)]) == 2
    assert "expected a folder of cases" in capsys.readouterr().err


def test_shifts_of_real_clips_are_found(scorer: SyncScorer, data: Path) -> None:
    clips = [clip for clip in real_clips(data) if abs(clip.known) <= 2]
    errors = [shift_test(scorer, c.frames, c.faces().boxes, c.sound, 0.0) for c in clips]
    assert len(errors) == 9
    assert np.mean(np.abs(errors) <= 1) >= 0.85
