"""What a live stream's sound and pictures go through: loudness on the way in, fragments on the way out."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import numbered

from avatar_rt import InputError
from avatar_rt.media.audio import LiveLoudness, loudness, read_audio
from avatar_rt.media.fragments import FragmentWriter

SPEECH = Path(__file__).resolve().parents[1] / "avatar_rt" / "samples" / "speech.wav"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return np.tile(read_audio(SPEECH).samples, 3)


# ---- loudness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.02, 0.3, 3.0])
def test_live_loudness_comes_to_the_target(speech: np.ndarray, gain: float) -> None:
    out = LiveLoudness()(speech * gain)
    assert loudness(out[3 * 16_000 :], 16_000) == pytest.approx(-16.0, abs=1.5)
    assert len(out) == len(speech) and out.dtype == np.float32


def test_live_loudness_does_not_depend_on_the_pieces(speech: np.ndarray) -> None:
    whole = LiveLoudness()(speech)
    random, live, pieces, at = np.random.default_rng(0), LiveLoudness(), [], 0
    while at < len(speech):
        n = int(random.integers(1, 3000))
        pieces.append(live(speech[at : at + n]))
        at += n
    assert np.array_equal(whole, np.concatenate(pieces))


def test_live_loudness_keeps_its_gain_in_silence_and_hears_no_future(speech: np.ndarray) -> None:
    live = LiveLoudness()
    assert not live(np.zeros(32_000, np.float32)).any()
    a = live(speech)
    live(np.zeros(5 * 16_000, np.float32))
    again = live(speech[:1600])
    assert np.abs(again / np.where(speech[:1600] == 0, 1, speech[:1600])).max() > 0.2
    other = LiveLoudness()
    other(np.zeros(32_000, np.float32))
    assert np.array_equal(other(speech[:8000]), a[:8000])
    with pytest.raises(InputError, match="mono"):
        live(np.zeros((2, 5), np.float32))
    with pytest.raises(InputError, match="multiple of 10"):
        LiveLoudness(16_001)


# ---- fragments -----------------------------------------------------------------------------------------------------


def test_fragments_are_one_film() -> None:
    """Every chunk is complete in its own fragment; all together decode to the frames and the sound that went in."""
    writer, frames = FragmentWriter((48, 64), 16_000), numbered(29 + 24 + 7)
    time = np.arange(60 * 640) / 16_000
    sound = (np.sin(2 * np.pi * (200 * time + 300 * time**2)) * 0.3).astype(np.float32)  # a chirp: a shift would show
    assert writer.mime == 'video/mp4; codecs="avc1.64000A, mp4a.40.2"'  # High, level 1
    film, shown = writer.init, 0
    assert film[4:8] == b"ftyp" and b"moov" in film and b"moof" not in film
    for n in (29, 24, 7):
        part = writer.write(frames[shown : shown + n], sound[shown * 640 : (shown + n) * 640])
        assert part[4:8] == b"moof" and part.count(b"moof") == 1 and b"moov" not in part
        film, shown = film + part, shown + n
        with av.open(io.BytesIO(film)) as container:
            got = list(container.decode(video=0))
        assert len(got) == shown  # nothing is held back
        assert [f.key_frame for f in got[-n:]] == [True] + [False] * (n - 1)
    film += writer.finish()
    with av.open(io.BytesIO(film)) as container:
        got = list(container.decode(video=0))
        assert [round(f.time * 25) for f in got] == list(range(60))
        grey = np.array([f.to_ndarray(format="rgb24").mean() for f in got])
    assert np.abs(grey - frames.mean((1, 2, 3))).max() < 3
    with av.open(io.BytesIO(film)) as container:
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert abs(len(wave) - len(sound)) <= 2048
    a, b = wave[4096:32_000], sound[4096:32_000]
    assert np.corrcoef(a, b)[0, 1] > 0.99


def test_fragments_refuse_what_does_not_fit() -> None:
    writer = FragmentWriter((48, 64), 16_000)
    with pytest.raises(InputError, match="frames: expected uint8"):
        writer.write(np.zeros((0, 48, 64, 3), np.uint8), np.zeros(0, np.float32))
    with pytest.raises(InputError, match=r"sound: expected \[640\]"):
        writer.write(numbered(1), np.zeros(639, np.float32))
    with pytest.raises(InputError, match="even height and width"):
        FragmentWriter((47, 64), 16_000)
