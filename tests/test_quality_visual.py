"""Picture, leakage and drift measures: known answers on made-up pictures."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from media_files import write_video

from avatar_rt.errors import ArtifactError
from avatar_rt.media.reader import read_video
from bench.quality import drift, leakage, qalign, visual
from bench.quality.clip import Clip, Faces
from bench.quality.drift import slope
from bench.quality.leakage import agreement, background, partial_correlation, person

BOX = np.array([40, 30, 88, 98], np.float32)  # a face in a picture of 128


def texture(seed: int, size: int = 128, grain: float = 3) -> np.ndarray:
    """Smooth coloured blobs, uint8 [size, size, 3]."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), grain)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def faces(frames: int) -> Faces:
    return Faces(np.repeat(BOX[None], frames, axis=0), np.ones(frames, bool))


def scene_with_person(place: np.ndarray, frames: int = 12, seed: int = 0) -> np.ndarray:
    """Somebody in front of ``place``, with camera noise: uint8 [F, 128, 128, 3]."""
    rng = np.random.default_rng(seed)
    hidden = cv2.resize(person(BOX[None], 128, 128)[0].astype(np.uint8), (128, 128)) > 0
    out = np.repeat(place[None].astype(np.float32), frames, axis=0)
    out[:, hidden] = texture(99)[hidden]
    return np.clip(out + rng.normal(0, 2, out.shape), 0, 255).astype(np.uint8)


# Sharpness, BRISQUE, likeness


def test_blur_loses_on_sharpness_brisque_and_likeness() -> None:
    crisp = np.stack([texture(i, grain=1) for i in range(3)])
    soft = np.stack([cv2.GaussianBlur(f, (0, 0), 2) for f in crisp])
    sharp, dull = (visual.sharpness(visual.grey(f)) for f in (crisp, soft))
    assert (sharp > 3 * dull).all()
    pytest.importorskip("brisque", reason="the package brisque is not installed: pip install -e '.[test]'")
    assert visual.brisque(soft) > visual.brisque(crisp) + 20
    alike = visual.likeness(soft, crisp)
    assert alike["psnr"] < 25 and alike["ssim"] < 0.8


def test_brisque_of_an_empty_picture_is_not_a_number() -> None:
    pytest.importorskip("brisque", reason="the package brisque is not installed: pip install -e '.[test]'")
    assert np.isnan(visual.brisque(np.full((2, 64, 64, 3), 90, np.uint8)))


def test_psnr_has_known_values() -> None:
    picture = np.full((9, 32, 32, 3), 100, np.uint8)
    assert visual.likeness(picture + 10, picture)["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    same = visual.likeness(picture, picture)
    assert same["psnr"] == pytest.approx(10 * np.log10(255**2 * 12)) and same["ssim"] == pytest.approx(1)


def test_likeness_after_resizing() -> None:
    small = np.stack([texture(i, 64) for i in range(4)])
    large = np.stack([cv2.resize(f, (256, 256), interpolation=cv2.INTER_CUBIC) for f in small])
    assert visual.likeness(large, small)["psnr"] > 38
    assert visual.likeness(large, small[::-1])["psnr"] < 20


# Flicker, consistency, stillness


@pytest.mark.parametrize("level", [1.0, 4.0])
def test_flicker_is_the_noise_where_nothing_moves(level: float) -> None:
    rng = np.random.default_rng(0)
    quiet = np.full((40, 128, 128), 120.0) + 0.5 * np.arange(40)[:, None, None]  # a drift is no flicker
    noisy = np.clip(np.round(quiet + rng.normal(0, level, quiet.shape)), 0, 255).astype(np.uint8)
    # The calmest 30 % of the pixels are a little quieter than the rest; rounding adds 1/12.
    assert visual.flicker(noisy) == pytest.approx(np.sqrt(level**2 + 1 / 12), rel=0.1)
    assert visual.flicker(np.round(quiet).astype(np.uint8)) < 0.5


def test_flicker_does_not_count_motion() -> None:
    place = visual.grey(texture(0)[None])[0]
    frames = np.repeat(place[None], 30, axis=0)
    for i, frame in enumerate(frames):
        frame[40:80, 2 * i : 2 * i + 30] = 250
    assert visual.flicker(frames) < 0.1


def test_warp_error_forgives_motion_and_sees_boiling() -> None:
    rng, wide = np.random.default_rng(0), visual.grey(texture(0, 200)[None])[0]
    pan = np.stack([wide[20:148, 2 * i : 2 * i + 128] for i in range(12)])
    moved = visual.changes(pan).mean()
    assert visual.warp_error(pan) < 0.25 * moved
    boiling = np.clip(pan + rng.normal(0, 8, pan.shape), 0, 255).astype(np.uint8)
    assert visual.warp_error(boiling) > 2 * visual.warp_error(pan)
    assert visual.warp_error(np.repeat(pan[:1], 5, axis=0)) == 0


def test_frozen_video_is_seen_behind_a_codec(tmp_path: Path) -> None:
    one = texture(3)
    frozen = read_video(write_video(tmp_path / "frozen.mp4", np.repeat(one[None], 50, axis=0))).frames
    alive = scene_with_person(one, 50)
    still = [np.mean(visual.changes(visual.grey(f)) < visual.STILL) for f in (frozen, alive)]
    assert still[0] > 0.9 and still[1] == 0


def test_picks() -> None:
    assert visual.picks(100, 3).tolist() == [0, 50, 99]
    assert visual.picks(2, 8).tolist() == [0, 1]


# Leakage


def _leak(place: np.ndarray, scene: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    shown = background(scene_with_person(place), np.repeat(BOX[None], 12, 0))
    behind = background(scene_with_person(reference, seed=5), np.repeat(BOX[None], 12, 0))
    return leakage.leakage(shown, cv2.resize(scene, (64, 64), interpolation=cv2.INTER_AREA).astype(float), behind)


def test_leakage_of_the_reference() -> None:
    scene, reference, third = texture(1, grain=6), texture(2, grain=6), texture(7, grain=6)
    right, leaked, wrong = (_leak(place, scene, reference) for place in (scene, reference, third))
    assert right["background_scene"] > 0.97 and abs(right["background_leak"]) < 0.15
    assert leaked["background_scene"] < 0.4 and leaked["background_leak"] > 0.95
    assert wrong["background_scene"] < 0.4 and abs(wrong["background_leak"]) < 0.4
    half = _leak((scene // 2 + reference // 2), scene, reference)
    assert 0.5 < half["background_scene"] < right["background_scene"] and half["background_leak"] > 0.9


def test_two_similar_places_are_no_leak() -> None:
    scene = texture(1, grain=6)
    alike = np.clip(0.9 * scene + 8 + 0.03 * texture(2), 0, 255).astype(np.uint8)
    got = _leak(scene, scene, alike)
    assert np.corrcoef(scene.ravel(), alike.ravel())[0, 1] > 0.99
    assert got["background_scene"] > 0.97 and abs(got["background_leak"]) < 0.15


def test_two_plain_walls_are_told_by_their_colour() -> None:
    white, blue = (np.full((128, 128, 3), c, np.uint8) for c in ((210, 205, 200), (60, 80, 150)))
    right, leaked = _leak(white, white, blue), _leak(blue, white, blue)
    assert right["background_scene"] > 0.95 and abs(right["background_leak"]) < 0.35
    assert leaked["background_scene"] < 0.1 and leaked["background_leak"] > 0.85


def test_a_picture_full_of_person_cannot_be_judged() -> None:
    box = np.array([[4, 4, 124, 124]], np.float32).repeat(3, 0)
    shown = background(np.repeat(texture(0)[None], 3, 0), box)
    got = leakage.leakage(shown, np.zeros((64, 64, 3)), np.zeros((64, 64, 3)))
    assert np.isnan(shown).all() and all(np.isnan(v) for v in got.values())


def test_what_moves_away_shows_what_is_behind() -> None:
    place = texture(4)
    boxes = np.stack([BOX + np.array([d, 0, d, 0], np.float32) for d in np.linspace(-36, 36, 30)])
    shown = background(np.repeat(place[None], 30, 0), boxes)
    fixed = background(np.repeat(place[None], 30, 0), np.repeat(BOX[None], 30, 0))
    assert np.isnan(shown).mean() < np.isnan(fixed).mean()


def test_agreement_and_partial_correlation() -> None:
    a, b, c = np.random.default_rng(0).normal(128, 40, (3, 5000))
    assert agreement(a, a) == 1 and abs(agreement(a, b)) < 0.1 and agreement(a, a + 60) < 0.7
    assert partial_correlation(a, a, c) == pytest.approx(1, abs=0.02)
    assert abs(partial_correlation(a + c, b + c, c)) < 0.05  # all that they share is c
    assert partial_correlation(c, c, c) == pytest.approx(0, abs=1e-9)


# Drift


def test_slope_of_a_ramp_with_wild_moments() -> None:
    rng = np.random.default_rng(0)
    ramp = 3 + 0.2 * np.arange(1000) / 25 + rng.normal(0, 0.05, 1000)
    ramp[300:420] += 5
    ramp[::7] = np.nan
    got = slope(ramp)
    assert got.value == pytest.approx(2, abs=0.03) and got.significant


def test_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [slope(0.2 * np.arange(500) / 25 + rng.normal(0, 0.3, 500)) for _ in range(100)]
    assert 88 <= sum(f.low <= 2 <= f.high for f in found) <= 100
    assert sum(slope(rng.normal(0, 0.3, 500)).significant for _ in range(100)) <= 12


def test_slope_needs_two_seconds_and_takes_an_hour() -> None:
    assert np.isnan(slope(np.arange(49.0)).value)
    assert slope(np.arange(50.0)).value == pytest.approx(250)
    assert slope(np.arange(90_000.0)).value == pytest.approx(250)
    assert slope(np.arange(20.0), rate=1).value == pytest.approx(10)


def test_colour_drift_has_a_known_slope() -> None:
    """Lightness rises by 8 and b falls by 6 in 10 s: a difference of 10, in face and background alike."""
    seconds, frames = 8, 200
    lab = np.zeros((frames, 64, 64, 3), np.float32)
    t = np.arange(frames) / 25
    lab[..., 0], lab[..., 2] = (45 + 0.8 * t)[:, None, None], (5 - 0.6 * t)[:, None, None]
    rgb = np.stack([cv2.cvtColor(f, cv2.COLOR_LAB2RGB) for f in lab]) * 255
    frames_ = np.clip(rgb + np.random.default_rng(0).normal(0, 2, rgb.shape), 0, 255).round().astype(np.uint8)
    seen = Faces(np.repeat((BOX / 2)[None], frames, 0), np.ones(frames, bool))
    found = drift.slopes(Clip(frames_), seen, {"identity": 0.9 - 0.01 * t})
    got = drift.values(found)
    assert t[-1] < seconds
    assert got["drift_colour_face"] == pytest.approx(10, abs=0.5)
    assert got["drift_colour_background"] == pytest.approx(10, abs=0.5)
    assert found["face_L"].value == pytest.approx(8, abs=0.4) and found["face_L"].significant
    assert got["drift_identity"] == pytest.approx(-0.1) and np.isnan(got["drift_sync"])


def test_a_background_that_is_uncovered_has_not_drifted() -> None:
    """The person walks from a dark side of the room to its bright side."""
    place = np.repeat(np.linspace(20, 230, 128).astype(np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    frames = np.repeat(place[None], 75, 0)
    boxes = np.stack([BOX + np.array([d, 0, d, 0], np.float32) for d in np.linspace(-15, 15, 75)])
    got = drift.colours(frames, boxes)["background"]
    assert np.ptp(got, axis=0).max() < 0.01
    assert np.isnan(drift.colours(frames, np.repeat(np.float32([[0, 0, 128, 128]]), 75, 0))["background"]).all()


def test_sharpness_drift() -> None:
    crisp = texture(0, grain=1)
    fading = np.stack([cv2.GaussianBlur(crisp, (0, 0), 0.3 + 0.02 * i) for i in range(100)])
    got = drift.slopes(Clip(fading), faces(100))["sharpness"]
    assert got.value < -0.5 and got.significant


# Names


def test_nothing_else_is_called_q_align(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected the Q-Align model"):
        qalign.QAlign(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArtifactError, match="nothing else is Q-Align"):
        qalign.QAlign(tmp_path)
    config.write_text(json.dumps({"model_type": "mplug_owl2"}))
    with pytest.raises(ArtifactError, match="its scoring"):
        qalign.QAlign(tmp_path)
    (tmp_path / "modeling.py").write_text("def score(): 'excellent good fair poor bad'\n")
    with pytest.raises(ArtifactError, match="expected the weights"):
        qalign.QAlign(tmp_path)
