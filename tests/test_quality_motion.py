"""Mouth and style measures: known answers on made-up traces, and the order of degraded videos on rendered cases."""

from __future__ import annotations

import numpy as np
import pytest

from avatar_rt.errors import InputError
from avatar_rt.models.motion import MOTION_CHANNELS, motion_index
from bench.quality import motion, style
from bench.quality.motion import VISEMES, both_sides, correlation, lag, mouth_measures, viseme_error, visemes
from bench.quality.style import blinks, calibrate, distances, retrieval, samples

FPS = 25


def still(frames: int) -> np.ndarray:
    return np.zeros((frames, MOTION_CHANNELS))


def talking(frames: int, size: float = 0.4, hertz: float = 3.0, shift: float = 0.0) -> np.ndarray:
    """A jaw that opens from 0 to ``size`` as a sine, ``shift`` frames late."""
    out = still(frames)
    t = (np.arange(frames) - shift) / FPS
    out[:, motion_index("jawOpen")] = size * (0.5 + 0.5 * np.sin(2 * np.pi * hertz * t))
    return out


def chatter(frames: int, seed: int) -> np.ndarray:
    """A jaw that moves irregularly, as speech does, between 0 and about 0.6."""
    noise = np.random.default_rng(seed).normal(size=frames + 40)
    smooth = np.convolve(noise, np.hanning(9), mode="same")[20:-20]
    out = still(frames)
    out[:, motion_index("jawOpen")] = np.clip(0.3 + 0.12 * smooth, 0, 1)
    return out


def jaw(trace: np.ndarray) -> np.ndarray:
    return trace[:, motion_index("jawOpen")]


def test_mouth_of_the_truth_itself_is_perfect() -> None:
    truth = chatter(100, 0)
    got = mouth_measures(truth, truth, jaw(truth))
    assert got["mouth_r"] == pytest.approx(1) and got["jaw_velocity_r"] == pytest.approx(1)
    assert got["mouth_error"] == 0 and got["viseme_error"] == 0 and got["mouth_lag"] == pytest.approx(0)


def test_mouth_error_sees_a_mumble_and_forgives_a_rest_position() -> None:
    truth, mumble = talking(100), talking(100, size=0.2)
    mumble[:, motion_index("jawOpen")] += 0.3
    got = mouth_measures(mumble, truth, jaw(truth))
    assert got["mouth_r"] == pytest.approx(1)
    above = jaw(truth) - np.quantile(jaw(truth), 0.05)
    assert got["mouth_error"] == pytest.approx(np.abs(above / 2).mean())


def test_frozen_mouth_and_another_sentence_lose() -> None:
    truth, other = chatter(100, 0), chatter(100, 1)
    frozen = np.repeat(truth[:1], 100, axis=0)
    own, still_, wrong = (mouth_measures(m, truth, jaw(truth)) for m in (truth, frozen, other))
    for bad in (still_, wrong):
        assert bad["mouth_error"] > own["mouth_error"] + 0.05
        assert bad["mouth_r"] < 0.3 and bad["jaw_velocity_r"] < 0.3 and bad["viseme_error"] > 0.2
    assert still_["mouth_r"] == 0 and np.isnan(still_["mouth_lag"])


@pytest.mark.parametrize("late", [-10, -3, 0, 1, 6, 10])
def test_lag_is_found(late: int) -> None:
    long = jaw(chatter(140, 2))
    truth, mouth = long[20:120], long[20 - late : 120 - late]
    assert lag(mouth, truth) == pytest.approx(late, abs=0.15)


def test_lag_between_frames() -> None:
    truth = jaw(talking(100, hertz=0.9))
    assert lag(jaw(talking(100, hertz=0.9, shift=2.4)), truth) == pytest.approx(2.4, abs=0.15)


def test_lag_of_unrelated_mouths_is_not_a_number() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 400))
    assert np.isnan(lag(*noise))


def test_short_traces_are_not_scored() -> None:
    truth = chatter(24, 0)
    assert all(np.isnan(v) for v in mouth_measures(truth, truth, jaw(truth)).values())
    assert np.isnan(correlation(np.arange(24.0), np.arange(24.0)))


def _shapes(order: list[int], size: float, smile: float = 0.0) -> np.ndarray:
    out = still(len(order))
    for i, shape in enumerate(np.array(list(VISEMES.values()))[order] * size):
        for name, value in zip(motion._LIPS, shape, strict=True):
            for full in (name, f"{name}Left", f"{name}Right"):
                if full in motion.ARKIT_NAMES:
                    out[i, motion_index(full)] = value
    for side in ("Left", "Right"):
        out[:, motion_index(f"mouthStretch{side}")] += smile
    return out


def test_visemes_are_told_at_any_amplitude_and_under_a_smile() -> None:
    order = [0, 1, 2, 3, 4] * 8
    for size, smile in ((1.0, 0.0), (0.5, 0.0), (1.8, 0.0), (1.0, 0.15)):
        assert visemes(_shapes(order, size, smile)).tolist() == order


def test_both_sides() -> None:
    trace = still(3)
    trace[:, motion_index("mouthStretchLeft")] = 1
    assert both_sides(trace, "mouthStretch").tolist() == [0.5] * 3


def test_viseme_error_forgives_one_frame() -> None:
    truth = np.repeat(np.arange(5), 6)
    assert viseme_error(np.roll(truth, 1)[1:], truth[1:]) == 0
    assert viseme_error(np.full_like(truth, 9), truth) == 1
    late = np.concatenate([truth[:1].repeat(3), truth[:-3]])
    assert viseme_error(late, truth) == pytest.approx(4 * 2 / 30)


def test_blinks_are_counted() -> None:
    """One blink every two seconds for 20 s, on lids that droop and flutter a little."""
    frames = 20 * FPS
    lids = 0.2 + 0.02 * np.random.default_rng(0).normal(size=frames)
    at = np.arange(FPS, frames, 2 * FPS)
    for i in at:
        lids[i - 2 : i + 4] = np.maximum(lids[i - 2 : i + 4], [0.4, 0.7, 0.95, 0.7, 0.5, 0.3])
    trace = still(frames)
    for side in ("Left", "Right"):
        trace[:, motion_index(f"eyeBlink{side}")] = lids
    assert blinks(trace).tolist() == at.tolist()
    assert distances(trace, trace)["style_blinks"] == 0
    never = trace.copy()
    never[:, motion_index("eyeBlinkLeft")] = never[:, motion_index("eyeBlinkRight")] = 0.2
    assert distances(never, trace)["style_blinks"] == pytest.approx(0.5)
    assert np.isnan(distances(never, trace)["style_blink_intervals"])
    assert distances(trace, trace)["style_blink_intervals"] == 0


def test_blink_intervals() -> None:
    def every(step: int) -> np.ndarray:
        trace = still(400)
        for side in ("Left", "Right"):
            trace[10::step, motion_index(f"eyeBlink{side}")] = 0.9
        return trace

    assert distances(every(50), every(25))["style_blink_intervals"] == pytest.approx(1.0)


def test_style_samples_have_their_units() -> None:
    frames, t = 1000, np.arange(1000) / FPS
    trace = talking(frames, size=0.4, hertz=0.5)
    trace[:, motion_index("yaw")] = 0.2 * np.sin(2 * np.pi * 0.5 * t)
    trace[:, motion_index("pitch")] = 0.05 * np.sin(2 * np.pi * 2 * t) + 0.3 * np.sin(2 * np.pi * 0.1 * t)
    got = samples(trace)
    assert got["yaw_speed"].mean() == pytest.approx(4 * 0.2 * 0.5, rel=0.03)  # a sine of A and f moves 4 A f a second
    assert got["nods"].mean() == pytest.approx(0.05 * 2 / np.pi, rel=0.05)  # the slow sway is no nod
    assert got["mouth"].max() == pytest.approx(0.4, rel=0.05)
    assert got["roll_speed"].max() == 0


def test_style_distance_is_in_units_of_strangers() -> None:
    small, large = talking(200, 0.3, 0.5), talking(200, 0.5, 0.5)
    got = distances(large, small)
    apart = np.mean(np.sort(samples(large)["mouth"]) - np.sort(samples(small)["mouth"]))
    assert got["style_mouth"] == pytest.approx(apart / style.SPREAD["mouth"])
    assert got["style_yaw_speed"] == 0
    assert distances(small, small)["style_distance"] == 0
    assert distances(still(200), small)["style_distance"] > 0


def test_retrieval_knows_people_from_noise() -> None:
    rng = np.random.default_rng(0)
    people = rng.normal(size=(60, 9))
    takes = [people + 0.05 * rng.normal(size=people.shape) for _ in range(2)]
    same = retrieval(*takes)
    assert same["style_top1"] > 0.95 and same["style_auc"] > 0.99 and same["style_chance"] == 1 / 60
    strangers = retrieval(takes[0], rng.normal(size=people.shape))
    assert strangers["style_top1"] < 0.1 and 0.4 < strangers["style_auc"] < 0.6
    takes[0][:30] = np.nan
    half = retrieval(*takes)
    assert half["style_top1"] == pytest.approx(0.5, abs=0.05)
    assert retrieval(np.ones((4, 9)), np.ones((4, 9))) == {"style_top1": 0, "style_chance": 0.25, "style_auc": 0.5}
    with pytest.raises(InputError, match="two alike"):
        retrieval(people, people[:5])


def test_what_carries_a_style() -> None:
    """Twelve people who differ in how far they open their mouths, and nod at random."""
    rng = np.random.default_rng(0)
    takes: tuple[list, list] = ([], [])
    for size in np.linspace(0.2, 0.8, 12):
        for side in takes:
            trace = talking(150, size, rng.uniform(2, 4), rng.uniform(0, 20))
            trace[:, motion_index("pitch")] = 0.05 * rng.uniform() * np.sin(np.arange(150) / 25 * 2 * np.pi * 2)
            side.append(trace)
    got = style.carries(*takes)
    assert got["mouth"] > 0.85 and 0.3 < got["nods"] < 0.7 and got["blinks"] == 0.5


def test_weights_tell_what_is_personal() -> None:
    rng = np.random.default_rng(1)
    person = rng.normal(size=(4000, 3)) * [1.0, 0.0, 1.0]
    takes = [person + rng.normal(size=(4000, 3)) * [0.5, 1.0, 1.0] for _ in range(2)]
    got = calibrate(*takes)
    assert got == pytest.approx([np.sqrt(0.8 / 0.25), 0, np.sqrt(0.5)], rel=0.1, abs=0.25)


def test_too_few_frames_for_a_style() -> None:
    with pytest.raises(InputError, match="at least 25 frames"):
        samples(still(24))
