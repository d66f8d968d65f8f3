"""The engine on the shipped weights: same seed, same bits; cache or no cache, same bits; files in, file out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from avatar_rt import AvatarEngine, InputError
from avatar_rt.errors import ArtifactError, UnsupportedError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.reader import read_video
from avatar_rt.runtime.manifest import open_bundle, shipped_bundle, write_manifest
from avatar_rt.session import Reference

SAMPLES = Path(__file__).resolve().parents[1] / "avatar_rt" / "samples"


@pytest.fixture(scope="module")
def engine() -> AvatarEngine:
    return AvatarEngine()


@pytest.fixture(scope="module")
def reference(engine: AvatarEngine) -> Reference:
    return engine.prepare(SAMPLES / "reference.mp4")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_audio(SAMPLES / "speech.wav").samples[: 2 * 16_000]


def _run(engine: AvatarEngine, reference: Reference, speech: np.ndarray, **options) -> np.ndarray:
    session = engine.session(reference, **({"steps": 3} | options))
    session.push_audio(speech)
    session.end_audio()
    return np.concatenate(list(session.frames()))


def test_same_seed_same_bits(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    first = _run(engine, reference, speech, seed=3)
    assert first.shape == (50, 256, 256, 3)
    assert np.array_equal(first, _run(engine, reference, speech, seed=3))
    assert not np.array_equal(first, _run(engine, reference, speech, seed=4))


def test_cache_on_and_off_are_bit_equal(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    on = _run(engine, reference, speech, use_cache=True)
    off = _run(engine, reference, speech, use_cache=False)
    assert np.array_equal(on, off)


def test_speech_and_reference_matter(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    plain = _run(engine, reference, speech).astype(int)
    silent = _run(engine, reference, np.zeros_like(speech)).astype(int)
    assert np.abs(plain - silent).mean() > 0.1


def test_sound_may_come_in_pieces(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    whole = _run(engine, reference, speech)
    session = engine.session(reference, steps=3)
    pieces = []
    for start in range(0, len(speech), 8000):
        session.push_audio(speech[start : start + 8000])
        pieces.append(session.total_frames)
    session.end_audio()
    assert pieces == sorted(pieces)
    assert np.array_equal(whole, np.concatenate(list(session.frames())))


def test_close_stops_the_stream(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    session = engine.session(reference, steps=3)
    session.push_audio(speech)
    session.end_audio()
    frames = session.frames()
    next(frames)
    session.close()
    assert list(frames) == []
    with pytest.raises(InputError, match="already ended"):
        session.push_audio(speech)


def test_generate_writes_sound_and_picture_in_sync(engine: AvatarEngine, reference: Reference, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = engine.generate(
        reference, SAMPLES / "speech.wav", tmp_path / "o.mp4", seconds=1.5, steps=2, progress=lambda *a: seen.append(a)
    )
    clip = read_video(out)
    assert clip.frames.shape[1:] == (256, 256, 3) and abs(len(clip.frames) - 38) <= 1
    assert clip.audio is not None and abs(len(clip.audio) / 16_000 - 1.5) < 0.1
    assert seen[0] == (0, 38) and seen[-1] == (38, 38)
    original = read_audio(SAMPLES / "speech.wav").samples[: len(clip.audio)]
    lag = np.argmax(np.correlate(clip.audio[4000:20000], original[4400:19600], mode="valid")) - 400
    assert abs(int(lag)) < 160  # 10 ms


def test_scene_changes_the_place(engine: AvatarEngine, reference: Reference, speech: np.ndarray) -> None:
    red = np.zeros((90, 120, 3), np.uint8)
    red[..., 0] = 200
    blue = red[..., ::-1].copy()
    a, b = (_run(engine, reference, speech[:16_000], scene=s)[:, :20, :20].mean((0, 1, 2)) for s in (red, blue))
    assert a[0] - a[2] > b[0] - b[2] + 20


def test_wrong_reference_and_options(engine: AvatarEngine, reference: Reference) -> None:
    with pytest.raises(InputError, match="other weights"):
        engine.session(dataclasses.replace(reference, weights_hash="0"))
    with pytest.raises(InputError, match="steps: expected at least 1"):
        engine.session(reference, steps=0)
    with pytest.raises(InputError, match="device: expected cpu or cuda"):
        AvatarEngine(device="abacus")
    with pytest.raises(InputError, match="finite mono samples"):
        engine.session(reference).push_audio(np.array([np.nan], np.float32))


def test_cuda_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="sees no CUDA GPU"):
        AvatarEngine(device="cuda")


def test_bundle_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a bundle directory with config\.json"):
        open_bundle(tmp_path)
    source = shipped_bundle()
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_bundle(tmp_path).weights_hash == open_bundle(source).weights_hash
    part = tmp_path / "vae.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"vae\.safetensors: does not match its hash"):
        open_bundle(tmp_path)
    part.unlink()
    with pytest.raises(ArtifactError, match="missing from the bundle"):
        open_bundle(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="expected format 1, got 99"):
        open_bundle(tmp_path)
    write_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="expected JSON"):
        open_bundle(tmp_path)


def test_shipped_weights_are_small() -> None:
    assert sum(p.stat().st_size for p in shipped_bundle().glob("*.safetensors")) <= 20_000_000
