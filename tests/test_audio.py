"""Sound files of every kind to 16 kHz mono, and loudness by BS.1770."""

from __future__ import annotations

import numpy as np
import pytest
from media_files import clicks, delay, write_sound, write_wav

from avatar_rt.errors import InputError
from avatar_rt.media.audio import LoudnessMeter, _k_filters, _k_weight, loudness, normalise_loudness, read_audio
from avatar_rt.media.stream import SpeechFile

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


@pytest.mark.parametrize("rate", [16_000, 11_025])
def test_loudness_does_not_depend_on_the_pieces(rate):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(23 * rate + 77) * np.repeat(rng.uniform(0, 0.3, 24), rate)[: 23 * rate + 77]
    whole = loudness(x, rate)
    meter, at = LoudnessMeter(rate), 0
    while at < len(x):
        size = int(rng.integers(1, 3 * rate))
        meter.add(x[at : at + size])
        at += size
    assert meter.lufs == whole
    # One FFT over all of it, which is what the meter does in pieces.
    y = _k_weight(x, rate)
    hop = round(0.1 * rate)
    power = np.array([np.mean(y[i : i + 4 * hop] ** 2) for i in range(0, len(x) - 4 * hop + 1, hop)])
    level = -0.691 + 10 * np.log10(power)
    kept = power[level > -70]
    kept = kept[-0.691 + 10 * np.log10(kept) > -0.691 + 10 * np.log10(kept.mean()) - 10]
    assert whole == pytest.approx(-0.691 + 10 * np.log10(kept.mean()), abs=1e-9)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
@pytest.mark.parametrize("seconds", [None, 10.7, 0.4])
def test_a_file_in_pieces_is_the_whole_file(tmp_path, rate, channels, seconds):
    path = write_wav(tmp_path / "s.wav", clicks(21.3, rate, channels), rate)
    whole, file = read_audio(path), SpeechFile(path, seconds=seconds)
    samples = whole.samples if seconds is None else whole.samples[: round(seconds * 16_000)]
    original = whole.original if seconds is None else whole.original[: round(seconds * rate)]
    heard, own = zip(*file.pieces(), strict=True)
    assert len(heard) == {None: 3, 10.7: 2, 0.4: 1}[seconds]
    assert file.num_samples == len(samples) and (file.rate, file.channels) == (rate, channels)
    assert np.array_equal(np.concatenate(heard), normalise_loudness(samples, 16_000))
    assert np.array_equal(np.concatenate(own), original)


def test_a_file_in_pieces_is_checked(tmp_path):
    with pytest.raises(InputError, match="seconds: expected more than 0, got -1"):
        SpeechFile(tmp_path / "s.wav", seconds=-1)
    with pytest.raises(InputError, match=r"at least 0.2 s of sound, got 0\.100 s"):
        SpeechFile(write_wav(tmp_path / "s.wav", clicks(0.1, 16_000), 16_000))
