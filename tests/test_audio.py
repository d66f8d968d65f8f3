"""Sound files of every kind to 16 kHz mono, and loudness by BS.1770."""

from __future__ import annotations

import numpy as np
import pytest
from media_files import clicks, delay, write_sound, write_wav

from avatar_rt.media.audio import _k_filters, loudness, normalise_loudness, read_audio

TRUTH = clicks(1.5, 16_000)[:, 0]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav(tmp_path, rate, channels):
    sound = clicks(1.5, rate, channels)
    speech = read_audio(write_wav(tmp_path / "s.wav", sound, rate))
    assert speech.samples.dtype == np.float32 and speech.samples.shape == (24_000,)
    assert speech.original.shape == sound.shape and speech.original_rate == rate and speech.rate == 16_000
    assert np.abs(speech.original - sound).max() < 1e-4
    assert abs(delay(TRUTH, speech.samples)) <= 1
    assert speech.seconds == 1.5


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("s.flac", "flac"),
        ("s.mp3", "libmp3lame"),
        ("s.m4a", "aac"),
        ("s.ogg", "libopus"),
        ("s.wav", "pcm_f32le"),
        ("t.wav", "pcm_s24le"),
        ("s.mkv", "aac"),
    ],
)
def test_codecs(tmp_path, name, codec):
    speech = read_audio(write_sound(tmp_path / name, clicks(1.5, 48_000, 2), 48_000, codec))
    assert abs(speech.seconds - 1.5) < 0.08
    assert abs(delay(TRUTH, speech.samples)) <= 4
    assert speech.original.shape[1] == 2


def test_max_seconds_and_sample_rate(tmp_path):
    speech = read_audio(write_wav(tmp_path / "s.wav", clicks(1.5, 44_100), 44_100), sample_rate=8_000, max_seconds=1)
    assert speech.samples.shape == (8_000,) and speech.original.shape == (44_100, 1)


def test_stereo_is_averaged(tmp_path):
    sound = clicks(1.0, 16_000, 2) * [1.0, 0.0]
    speech = read_audio(write_wav(tmp_path / "s.wav", sound, 16_000))
    assert np.abs(speech.samples - sound[:, 0] / 2).max() < 1e-4


def test_k_filters_are_the_standards_at_48_khz():
    """The tables of BS.1770-5, annex 1."""
    (b, a), (c, d) = [[np.array(v) / den[0] for v in (num, den)] for num, den in _k_filters(48_000)]
    assert np.allclose(b, [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-7)
    assert np.allclose(a, [1.0, -1.69065929318241, 0.73248077421585], atol=1e-7)
    assert np.allclose(c, [1.0, -2.0, 1.0], atol=1e-7)
    assert np.allclose(d, [1.0, -1.99004745483398, 0.99007225036621], atol=1e-7)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_loudness_of_a_known_tone(rate):
    """A full-scale 997 Hz tone in one channel reads -3.01 LUFS."""
    tone = np.sin(2 * np.pi * 997 * np.arange(3 * rate) / rate)
    assert loudness(tone, rate) == pytest.approx(-3.01, abs=0.05)
    assert loudness(tone / 10, rate) == pytest.approx(-23.01, abs=0.05)


def test_pauses_are_gated():
    tone = np.sin(2 * np.pi * 997 * np.arange(48_000) / 16_000)
    assert loudness(np.concatenate([tone, np.zeros(64_000)]), 16_000) == pytest.approx(loudness(tone, 16_000), abs=0.3)


@pytest.mark.parametrize("seconds", [0.05, 0.39, 0.41, 3.0])
def test_normalise_loudness(seconds):
    samples = 0.01 * np.random.default_rng(0).standard_normal(round(seconds * 16_000)).astype(np.float32)
    out = normalise_loudness(samples, 16_000)
    assert out.dtype == np.float32 and out.shape == samples.shape
    assert loudness(out, 16_000) == pytest.approx(-16.0, abs=0.01)


def test_silence_and_hiss_stay_quiet():
    assert not normalise_loudness(np.zeros(16_000, np.float32), 16_000).any()
    assert normalise_loudness(np.zeros(0, np.float32), 16_000).shape == (0,)
    hiss = 1e-4 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    assert np.abs(normalise_loudness(hiss, 16_000)).max() <= 100.1 * np.abs(hiss).max()
