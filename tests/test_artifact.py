"""A person in a file: the same bits from it as from the clip, and no other file taken for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_bundle import CONFIG, write_bundle

from avatar_rt import AvatarEngine, Reference
from avatar_rt.__main__ import SAMPLES, main
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.pipeline.reference import pack_cache
from avatar_rt.runtime.artifact import from_storage, read_artifact, to_storage, write_artifact
from avatar_rt.runtime.offload import HostCopies, Prefetched


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AvatarEngine:
    return AvatarEngine(write_bundle(tmp_path_factory.mktemp("bundle") / "small"))


@pytest.fixture(scope="module")
def clip(engine: AvatarEngine) -> Reference:
    return engine.prepare(SAMPLES / "reference.mp4", consent="record-7")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_audio(SAMPLES / "speech.wav").samples[: 2 * 16_000]


def _frames(engine: AvatarEngine, reference: Reference, speech: np.ndarray, **options) -> np.ndarray:
    session = engine.session(reference, **options)
    session.push_audio(speech)
    session.end_audio()
    return np.concatenate(list(session.frames()))


def test_a_file_gives_the_bits_of_the_clip(engine, clip, speech, tmp_path) -> None:
    assert clip.save(tmp_path / "p.avref") == (0.0, 0.0)
    loaded = engine.prepare(tmp_path / "p.avref")
    assert torch.equal(loaded.cache.k, clip.cache.k) and torch.equal(loaded.cache.v, clip.cache.v)
    assert loaded.content == clip.content and loaded.exact
    assert (loaded.consent, dict(loaded.clip)) == ("record-7", dict(clip.clip))
    assert loaded.clip["name"] == "reference.mp4" and loaded.clip["frames"] == len(clip.frames)
    whole = _frames(engine, clip, speech)
    assert np.array_equal(whole, _frames(engine, loaded, speech))
    assert np.array_equal(whole, _frames(engine, loaded, speech, use_cache=False))  # level 1 is all there too


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.01), ("fp8", 0.04)])
def test_lossy_storage_says_what_it_costs_and_can_be_undone(engine, clip, tmp_path, storage, most) -> None:
    errors = clip.save(tmp_path / "p.avref", storage=storage)
    clip.save(tmp_path / "exact.avref")
    assert all(0 < e < most for e in errors)
    loaded = engine.prepare(tmp_path / "p.avref")
    assert not loaded.exact and loaded.errors == errors and loaded.storage == storage
    difference = (loaded.cache.k.float() - clip.cache.k.float()).square().mean().sqrt()
    relative = float(difference / clip.cache.k.float().square().mean().sqrt())
    # Rounding to the computing dtype comes on top of what was measured.
    assert relative == pytest.approx(errors[0], abs=0 if clip.cache.k.dtype == torch.float32 else 3e-3, rel=0.05)
    assert loaded.content != clip.content
    exact = engine.prepare(tmp_path / "p.avref", exact=True)
    assert torch.equal(exact.cache.k, clip.cache.k) and exact.exact and exact.content == clip.content


def test_lossy_storage_is_smaller() -> None:
    x = torch.randn(2, 1, 50, 2, 64)
    for storage in ("int8", "fp8"):
        stored, _ = to_storage(x, storage)
        assert sum(t.numel() * t.element_size() for t in stored.values()) < 0.27 * x.numel() * 4
        assert (from_storage(stored, torch.float32) - x).abs().max() <= x.abs().max() / (
            250 if storage == "int8" else 15
        )
    with pytest.raises(InputError, match="storage: expected one of fp32"):
        to_storage(x, "int3")


def test_another_dtype_computes_level_2_again(engine, clip, tmp_path) -> None:
    clip.save(tmp_path / "p.avref")
    other = torch.float32 if engine.dtype == torch.bfloat16 else torch.bfloat16
    second = AvatarEngine(engine.bundle.path, dtype=other)
    loaded = second.prepare(tmp_path / "p.avref")
    assert loaded.cache.k.dtype == other
    assert torch.equal(loaded.cache.k, second.prepare(SAMPLES / "reference.mp4").cache.k)


def _changed(path: Path, out: Path, change) -> Path:
    with safe_open(path, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    tensors, text = change(tensors, metadata["avatar_rt"])
    save_file(tensors, out, metadata={"avatar_rt": text})
    return out


def test_a_file_that_does_not_fit_is_refused_with_the_remedy(engine, clip, tmp_path) -> None:
    good = tmp_path / "p.avref"
    clip.save(good)
    data = good.read_bytes()
    cut, bit, text, empty = (tmp_path / f"{n}.avref" for n in ("cut", "bit", "text", "empty"))
    cut.write_bytes(data[:-100])
    bit.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    text.write_text("not a person")
    empty.write_bytes(b"")
    consent = _changed(good, tmp_path / "c.avref", lambda t, m: (t, m.replace("record-7", "record-8")))
    version = _changed(good, tmp_path / "v.avref", lambda t, m: (t, m.replace('"format": 1', '"format": 9')))
    gone = _changed(good, tmp_path / "g.avref", lambda t, m: ({k: v for k, v in t.items() if k != "k.001"}, m))
    other = tmp_path / "o.avref"
    write_artifact(other, "song", 1, {}, {"x": torch.zeros(1)})
    cases = {
        cut: "cut short", bit: "altered", text: "cut short or damaged", empty: "cut short", consent: "altered",
        version: "expected format 1 of avref, got 9", gone: "altered", other: "of kind avref, got 'song'",
    }  # fmt: skip
    for file, says in cases.items():
        with pytest.raises(ArtifactError, match=says) as stop:
            engine.prepare(file)
        assert "avatar-rt prepare" in str(stop.value) and "\n" not in str(stop.value)
    with pytest.raises(InputError, match="no such file"):
        engine.prepare(tmp_path / "nowhere.avref")


@pytest.mark.parametrize(("change", "says"), [({"seed": 1}, "weights"), ({"reference_latents": 2}, "a model")])
def test_a_file_for_another_model_is_refused(engine, clip, tmp_path, change, says) -> None:
    clip.save(tmp_path / "p.avref")
    other = AvatarEngine(write_bundle(tmp_path / "other", **change))
    with pytest.raises(ArtifactError, match=f"prepared with {says}.*avatar-rt prepare"):
        other.prepare(tmp_path / "p.avref")
    with pytest.raises(InputError, match="other weights"):
        other.session(clip)


def test_sampling_and_chunks_do_not_spoil_a_file(engine, clip, tmp_path) -> None:
    clip.save(tmp_path / "p.avref")
    sampling = dataclasses.replace(CONFIG.sampling, steps=3)
    other = AvatarEngine(write_bundle(tmp_path / "other", sampling=sampling))
    assert torch.equal(other.prepare(tmp_path / "p.avref").cache.k, clip.cache.k)


def test_artifacts_are_whole_or_not_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.x"
    write_artifact(path, "x", 1, {"n": 1}, {"t": torch.arange(3)})
    monkeypatch.setattr("avatar_rt.runtime.artifact.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match="cannot be written there"):
        write_artifact(path, "x", 1, {"n": 2}, {"t": torch.arange(4)})
    header, tensors = read_artifact(path, "x", 1, "")
    assert header["n"] == 1 and len(tensors["t"]) == 3 and [p.name for p in tmp_path.iterdir()] == ["a.x"]


class _Fake:
    """Copies that record their order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self, block):
        self.log.append(f"start {block}")
        return [block]

    def finish(self, copy):
        self.log.append(f"finish {copy[0]}")
        return copy[0]


def test_the_next_block_is_on_its_way_when_one_is_handed_out() -> None:
    fake = _Fake()
    blocks = Prefetched([0, 1, 2], fake)
    assert [blocks[i] for i in (0, 1, 2, 0)] == [0, 1, 2, 0] and len(blocks) == 3
    assert fake.log == ["start 0", "start 1", "finish 0", "start 2", "finish 1", "start 0", "finish 2", "start 1",
                        "finish 0"]  # fmt: skip
    fake.log.clear()
    assert (blocks[0], blocks[2], blocks[-1], list(blocks[0:2])) == (0, 2, 2, [0, 1])
    assert "start 2" in fake.log
    with pytest.raises(IndexError):
        blocks[3]
    assert Prefetched([5], fake)[0] == 5 and list(Prefetched("ab", HostCopies())) == ["a", "b"]


def test_offloaded_rows_give_the_same_bits(engine, clip, speech) -> None:
    offloaded = engine.prepare(SAMPLES / "reference.mp4", offload=True)
    assert isinstance(offloaded.cache.packed, Prefetched)
    assert pack_cache(offloaded.cache) is offloaded.cache
    assert np.array_equal(_frames(engine, clip, speech), _frames(engine, offloaded, speech))


def test_prepare_command(engine, tmp_path, capsys) -> None:
    bundle, out = str(engine.bundle.path), tmp_path / "p.avref"
    given = ["prepare", str(SAMPLES / "reference.mp4"), "-o", str(out), "--bundle", bundle]
    assert main([*given, "--consent", "c-1"]) == 0 and "error" not in capsys.readouterr().out
    assert main([*given, "--storage", "int8"]) == 0 and "relative error of keys" in capsys.readouterr().out
    video = tmp_path / "o.mp4"
    speech = str(SAMPLES / "speech.wav")
    assert main(["generate", str(out), speech, "-o", str(video), "--bundle", bundle, "--seconds", "1"]) == 0
    assert main(["prepare", str(SAMPLES / "reference.mp4"), "-o", str(tmp_path / "p.mp4")]) == 2
    assert "ending in .avref" in capsys.readouterr().err
