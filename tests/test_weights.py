"""Loading and saving weights: whole or not at all, and every bad file is one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from avatar_rt.config import DiTConfig, VAEConfig
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.names import foreign_names
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights, open_checkpoint, save_weights

TINY = DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4, freq_dim=16)
FULL = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=16, mask_channels=2,
    reference=True, anchor=True, audio_dim=8, reference_audio_dim=4, audio_adapter_dim=4, motion_dim=8,
)  # fmt: skip


@pytest.fixture
def model() -> VideoRefDiT:
    return VideoRefDiT(TINY)


def meta(cfg: DiTConfig = TINY) -> VideoRefDiT:
    with torch.device("meta"):
        return VideoRefDiT(cfg)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, "diffusers", "wan", "tavr"])
@pytest.mark.parametrize("shard_bytes", [None, 5_000])
def test_what_is_saved_is_loaded(
    model: VideoRefDiT, tmp_path: Path, names: str | None, shard_bytes: int | None
) -> None:
    path = tmp_path / "new" / "dit.safetensors"
    save_weights(model, path, names=names, shard_bytes=shard_bytes, metadata={"steps": "12"})
    assert path.is_file() == (shard_bytes is None)
    for source in (path, path.parent):
        loaded = meta()
        assert load_weights(loaded, source, names=names)["steps"] == "12"
        assert same(loaded, model)
        assert all(p.requires_grad for p in loaded.parameters())
    assert not list(path.parent.glob(".*"))


def test_a_model_with_every_addition_round_trips(tmp_path: Path) -> None:
    model, loaded = VideoRefDiT(FULL), meta(FULL)
    save_weights(model, tmp_path / "dit.safetensors")
    load_weights(loaded, tmp_path / "dit.safetensors")
    assert same(loaded, model)


def test_vae_round_trips_under_diffusers_names(tmp_path: Path) -> None:
    cfg = VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), latent_channels=2)
    vae, loaded = VideoVAE(cfg), VideoVAE(cfg)
    save_weights(vae, tmp_path / "vae.safetensors", names="diffusers")
    assert "decoder.mid_block.resnets.0.conv1.weight" in open_checkpoint(tmp_path / "vae.safetensors").tensors
    load_weights(loaded, tmp_path / "vae.safetensors", names="diffusers")
    assert same(loaded, vae)


def test_no_two_tensors_share_a_foreign_name() -> None:
    cfg = DiTConfig(**{**FULL.__dict__, "motion_dim": 0})
    for model, scheme in ((meta(cfg), "tavr"), (meta(), "diffusers"), (meta(), "wan")):
        named = foreign_names(model, scheme)
        assert len({name.of(key) for key, name in named.items()}) == len(model.state_dict())


def test_dtype_in_the_file_and_after_loading(model: VideoRefDiT, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_weights(model, path, dtype=torch.bfloat16)
    kept, raised = meta(), meta()
    load_weights(kept, path)
    load_weights(raised, path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in raised.parameters()} == {torch.float32}
    assert same(raised, model.bfloat16().float())


def test_shards_stay_below_the_limit_and_leave_no_old_ones(model: VideoRefDiT, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_weights(model, path)
    save_weights(model, path, shard_bytes=5_000)
    many = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "dit.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for shard in many:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 5_000
    save_weights(model, path, shard_bytes=20_000)
    few = sorted(tmp_path.glob("*.safetensors"))
    assert 1 < len(few) < len(many) and not path.exists()
    save_weights(model, path)
    assert same(model, _loaded(path))


def _loaded(path: Path) -> VideoRefDiT:
    model = meta()
    load_weights(model, path)
    return model


def test_the_old_file_survives_a_save_that_fails(
    model: VideoRefDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dit.safetensors"
    save_weights(model, path)
    before = path.read_bytes()

    def full_disk(tensors: object, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("avatar_rt.models.weights.save_file", full_disk)
    with pytest.raises(InputError, match=r"dit.safetensors: cannot be written .*No space left on device"):
        save_weights(VideoRefDiT(TINY), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["dit.safetensors"]


# ---- bad files -------------------------------------------------------------------------------------------------------


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _header_of(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the JSON header, whatever that does to the file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda p: p.unlink(), "expected a weight file, got nothing of this name"),
    "empty": (lambda p: p.write_bytes(b""), "expected a safetensors file, got 0 bytes"),
    "cut in the data": (lambda p: _truncate(p, 30_000), r"truncated or damaged: expected \d+ bytes, got 30000"),
    "cut in the header": (lambda p: _truncate(p, 100), "expected a safetensors file, got 100 bytes"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"more"), "truncated or damaged: expected"),
    "text": (lambda p: p.write_text("<!doctype html><title>404</title>"), "expected a safetensors file, got 33 bytes"),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "got a Git LFS pointer"),
    "pickled": (lambda p: torch.save({"q": torch.ones(1)}, p), "got pickled weights, .*convert the file first"),
    "an old pickle": (lambda p: p.write_bytes(pickle.dumps({"q": 1}, protocol=2)), "got pickled weights"),
    "header not JSON": (
        lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        "header of 4 bytes is unreadable",
    ),
    "header a list": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "header of 2 bytes is unreadable"),
    "header without shapes": (
        lambda p: _header_of(p, lambda h: h["head.head.bias"].pop("shape")),
        "damaged safetensors file: its header of",
    ),
    "overlapping tensors": (
        lambda p: _header_of(p, lambda h: h["head.head.bias"].update(data_offsets=[0, 256])),
        r"dit.safetensors: (damaged|truncated)",
    ),
    "a tensor missing": (
        lambda p: _edit(p, lambda t: t.pop("blocks.1.self_attn.q.weight")),
        r"expected the 69 tensors of VideoRefDiT, got 68: 1 missing \(blocks.1.self_attn.q.weight\)",
    ),
    "a tensor too many": (
        lambda p: _edit(p, lambda t: t.update({"blocks.2.modulation": torch.ones(1, 6, 24)})),
        r"got 70: 1 unexpected \(blocks.2.modulation\)",
    ),
    "another shape": (
        lambda p: _edit(p, lambda t: t.update({"head.head.bias": torch.ones(48)})),
        r"1 tensors differ from what was expected: head.head.bias F32 \[48\] for floating point \[64\]",
    ),
    "same size, another shape": (
        lambda p: _edit(p, lambda t: t.update({"head.modulation": torch.ones(2, 24)})),
        r"head.modulation F32 \[2, 24\] for floating point \[1, 2, 24\]",
    ),
    "integers": (
        lambda p: _edit(p, lambda t: t.update({"head.head.bias": torch.ones(64, dtype=torch.int32)})),
        r"head.head.bias I32 \[64\] for floating point \[64\]",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_changes_nothing(case: str, tmp_path: Path) -> None:
    spoil, sentence = BAD_FILES[case]
    path = tmp_path / "dit.safetensors"
    save_weights(VideoRefDiT(TINY), path)
    spoil(path)
    model = VideoRefDiT(TINY)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=sentence) as raised:
        load_weights(model, path)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(tmp_path))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_by_name_and_never_opened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"weights{suffix}: expected safetensors, got pickled weights"):
        load_weights(meta(), tmp_path / f"weights{suffix}")


def _index(path: Path, change: Callable[[dict], object]) -> None:
    index = path.with_name(path.name + ".index.json")
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one shard missing": (
        lambda p: sorted(p.parent.glob("*-00002-of-*"))[0].unlink(),
        r"1 of \d+ shards are missing: dit-00002-of-\d+.safetensors",
    ),
    "one shard cut": (lambda p: _truncate(sorted(p.parent.glob("*-00001-of-*"))[0], 900), "got 900"),
    "a tensor not where it should be": (
        lambda p: _index(p, lambda i: i["weight_map"].update({"extra": i["weight_map"]["head.head.bias"]})),
        "1 tensors are not in the shards it names: extra",
    ),
    "index outside its directory": (
        lambda p: _index(p, lambda i: i["weight_map"].update({"head.head.bias": "../other.safetensors"})),
        "expected an index with a weight_map",
    ),
    "index without a map": (lambda p: _index(p, lambda i: i.pop("weight_map")), "expected an index with a weight_map"),
    "index not JSON": (lambda p: Path(f"{p}.index.json").write_text("{"), "expected an index with a weight_map"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_one_sentence(case: str, tmp_path: Path) -> None:
    spoil, sentence = BAD_SHARDS[case]
    path = tmp_path / "dit.safetensors"
    save_weights(VideoRefDiT(TINY), path, shard_bytes=20_000)
    spoil(path)
    with pytest.raises(ArtifactError, match=sentence):
        load_weights(meta(), path)


def test_directories(model: VideoRefDiT, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a .safetensors file in this directory, got none"):
        load_weights(meta(), tmp_path)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model, tmp_path / "b.safetensors")
    with pytest.raises(ArtifactError, match=r"expected one checkpoint, got 2: a.safetensors, b.safetensors"):
        load_weights(meta(), tmp_path)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_wrong_names_say_which_would_fit(model: VideoRefDiT, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "dit.safetensors", names="diffusers")
    with pytest.raises(ArtifactError, match=r"names='diffusers' would fit"):
        load_weights(meta(), tmp_path / "dit.safetensors")


def test_names_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="names: expected None or one of diffusers, wan, tavr, got 'hf'"):
        foreign_names(meta(), "hf")
    with pytest.raises(InputError, match=r"names: diffusers has no name for .* anchor_embedding"):
        foreign_names(meta(FULL), "diffusers")
    with pytest.raises(InputError, match=r"names: tavr has no name for .* motion_"):
        foreign_names(meta(FULL), "tavr")


def test_what_cannot_be_saved(model: VideoRefDiT, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected weights to save, got .* on the meta device"):
        save_weights(meta(), tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=r"expected a name ending in .safetensors, got dit.pt"):
        save_weights(model, tmp_path / "dit.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_weights(model, tmp_path / "file" / "dit.safetensors")


def test_metadata_is_text_in_the_header(model: VideoRefDiT, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "dit.safetensors", metadata={"licence": "Apache-2.0"})
    with safe_open(tmp_path / "dit.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt", "licence": "Apache-2.0"}
