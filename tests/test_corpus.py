"""The procedural corpus: determinism, truth that fits the pictures, shards that are whole or absent."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from avatar_rt.errors import ArtifactError, InputError
from training.data.corpus import ARRAYS, Corpus

LACKING = [name for name in ("numba", "anny") if importlib.util.find_spec(name) is None]
needs_renderer = pytest.mark.skipif(
    bool(LACKING), reason=f"the training extras are not installed: {', '.join(LACKING)}"
)
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def fake_shard(path: Path, clips: list[tuple[int, int]], frames: int = 5, size: int = 8, seed: int = 0) -> None:
    """A rendered shard of noise; ``clips`` are (identity, take)."""
    path.mkdir(parents=True)
    n, rng = len(clips), np.random.default_rng(seed)
    arrays = {
        "frames": rng.integers(0, 255, (n, frames, size, size, 3), np.uint8),
        "audio": rng.integers(-99, 99, (n, frames * 640), np.int16),
        "motion": rng.random((n, frames, 62), np.float32),
        "phonemes": np.zeros((n, frames), np.int16),
        "mouth": rng.random((n, frames), np.float32),
        "background": np.zeros((n, size, size, 3), np.uint8),
        "facebox": np.zeros((n, frames, 4), np.float32),
    }
    for name in ARRAYS:
        np.save(path / f"{name}.npy", arrays[name])
    (path / "meta.jsonl").write_text("".join(json.dumps({"identity": i, "take": t}) + "\n" for i, t in clips))


def test_corpus_splits_by_identity_and_cuts(tmp_path: Path) -> None:
    fake_shard(tmp_path / "shard-00000", [(0, 0), (0, 1), (1, 0), (1, 1)])
    fake_shard(tmp_path / "shard-00001", [(19, 0), (20, 0), (21, 0)])
    train, val, every = (Corpus(tmp_path, s) for s in ("train", "val", "all"))
    assert list(val.identity) == [0, 0, 20] and list(train.identity) == [1, 1, 19, 21] and len(every) == 7
    assert val.siblings(0) == [1] and val.siblings(2) == []
    assert train.frames(3, 2, 3).shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(train.audio(0, 1, 2), train.audio(0)[640:1920])
    with pytest.raises(InputError, match=r"within 0\.\.5"):
        train.motion(0, 3, 3)


def test_a_missing_or_damaged_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no corpus"):
        Corpus(tmp_path)
    fake_shard(tmp_path / "shard-00000", [(0, 0), (1, 0)])
    (tmp_path / "shard-00000" / "meta.jsonl").write_text('{"identity": 0}\n')
    with pytest.raises(ArtifactError, match="as many clips"):
        Corpus(tmp_path)
    with pytest.raises(InputError, match="split"):
        Corpus(tmp_path, "test")


def test_every_engine_speaks_the_same_phonemes() -> None:
    from training.data.phonemes import FLITE, IPA, PHONEMES, from_ipa
    from training.data.visemes import SHAPES

    assert len(PHONEMES) == len(set(PHONEMES)) == 40 and PHONEMES[0] == "SIL"
    assert set(IPA.values()) == set(FLITE.values()) - {0} == set(range(1, 40))
    assert [PHONEMES[from_ipa(x) or 0] for x in ("ˈiː", "tʃ", "ɜː", "əʊ", "ʊ")] == ["IY", "CH", "ER", "OW", "UH"]
    assert from_ipa("") is None and (SHAPES[0] == 0).all() and (SHAPES[1:].max(1) > 0).all()


@pytest.mark.skipif(importlib.util.find_spec("soundfile") is None, reason="soundfile is not installed")
@needs_espeak
def test_other_languages_are_spoken_and_understood() -> None:
    from training.data.languages import LANGUAGES, make_foreign_sentence
    from training.data.phonemes import PHONEMES
    from training.data.speech import Speaker, Voice, draw_voice

    speaker, rng, heard = Speaker(), np.random.default_rng(0), {}
    try:
        for language in LANGUAGES:
            said = [speaker.say(Voice("espeak", "f2", language, 1.0, 50, 50, 1.0), make_foreign_sentence(language, rng))
                    for _ in range(4)]  # fmt: skip
            heard[language] = {PHONEMES[p] for u in said for p, _, _ in u.phones}
            seconds = sum(len(u.wave) for u in said) / 16_000
            assert sum(b - a for u in said for p, a, b in u.phones if p == 0) < 0.1 * seconds  # each sound has a shape
    finally:
        speaker.close()
    assert all(len(h) > 15 for h in heard.values()) and len({frozenset(h) for h in heard.values()}) == len(LANGUAGES)
    voices = [draw_voice(np.random.default_rng(i), "male", held) for held in (False, True) for i in range(99)]
    assert {v.accent for v in voices[:99]} >= set(LANGUAGES) and not {v.accent for v in voices[99:]} & set(LANGUAGES)


@needs_renderer
def test_lips_open_with_the_jaw_and_close_in_silence() -> None:
    from avatar_rt.models.motion import motion_index
    from training.data.heads import express, lip_opening, make_head
    from training.data.visemes import mouth_curves

    head = make_head(3)
    opening = []
    for jaw in (0.0, 0.3, 0.8):
        motion = np.zeros(62, np.float32)
        motion[motion_index("jawOpen")] = jaw
        opening.append(lip_opening(head, express(head, motion)))
    assert opening[0] == 0 and 0.02 < opening[1] < opening[2] < 0.4
    still = mouth_curves(((0, 0.0, 1.0),), 1.0, lead=0.08, slack=1.0)
    assert np.abs(still).max() < 1e-6


@needs_renderer
@needs_espeak
def test_a_clip_is_the_same_twice_and_its_truth_fits(tmp_path: Path) -> None:
    from training.data.clip import make_clip
    from training.data.render import write_shard
    from training.data.speech import Speaker

    speaker = Speaker()
    try:
        first, again, other = (
            make_clip(speaker, 3, take, frames=9, size=32, sampling=2, held_out=True) for take in (0, 0, 1)
        )
    finally:
        speaker.close()
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.meta["voice"] == other.meta["voice"] and first.meta["style"] == other.meta["style"]
    assert first.meta["sentence"] != other.meta["sentence"] and (first.background != other.background).any()
    height = (first.facebox[:, 3] - first.facebox[:, 1]) / 32
    assert 0.45 < height.mean() < 0.7  # the framing of media.face
    person = np.abs(first.frames.astype(int) - first.background).max(-1) > 40
    assert person[:, 12:24, 10:22].mean() > 0.5  # a face in the middle
    write_shard(tmp_path / "shard-00000", [first, other])
    corpus = Corpus(tmp_path)
    np.testing.assert_array_equal(corpus.frames(1), other.frames)
    assert corpus.meta[0]["caption"] == first.meta["caption"] and corpus.audio(0).shape == (9 * 640,)
