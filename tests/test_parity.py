"""Real checkpoints fit: on random weights our classes compute what the published ones compute, to fp32 rounding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_rt.config import DiTConfig, VAEConfig, preset
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights, save_weights

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of these tests: pip install .[test]")

LIMIT = 1e-5
FIXTURE = ROOT / "tests" / "data" / "tavr_small.safetensors"
ADDITIONS_OFF = {
    "mask_channels": 0, "reference": False, "anchor": False, "audio_dim": 0, "reference_audio_dim": 0,
    "audio_adapter_dim": 0, "motion_dim": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def error(ours: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    assert ours.shape == truth.shape and ours.dtype == truth.dtype
    return ((ours - truth).abs().max() / truth.abs().max()).item()


def shake(module: nn.Module) -> nn.Module:
    """Random weights with no trivial value: a norm's weight is not 1, no bias or modulation is 0."""
    for name, p in module.named_parameters():
        noise = torch.randn_like(p)
        if p.ndim < 2 or "norm" in name:
            p.copy_(p + 0.3 * noise if "norm" in name else 0.2 * noise)
        elif "scale_shift_table" in name:
            p.copy_(0.4 * noise)
        else:
            p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval()


def on_meta(build: type[nn.Module], *args: object) -> nn.Module:
    with torch.device("meta"):
        return build(*args)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- diffusers' transformer ------------------------------------------------------------------------------------------

SMALL = DiTConfig(dim=96, ffn_dim=160, num_heads=3, num_layers=3, text_dim=24, text_len=8, freq_dim=64)


def diffusers_transformer(cfg: DiTConfig) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=cfg.patch, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels, out_channels=cfg.latent_channels, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, eps=cfg.eps,
    )  # fmt: skip


def small_inputs(cfg: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, flow times that 1000 scales without rounding, text with zero rows at the end.

    Most of the remaining error is the oracle's: it takes the timestep's sinusoids in fp32, which shows as t grows.
    """
    latents, text = torch.randn(2, cfg.in_channels, 3, 10, 6), torch.randn(2, cfg.text_len, cfg.text_dim)
    text[1, 5:] = 0
    return latents, torch.tensor([0.125, 0.75]), text


@pytest.mark.parametrize("layout", ["one file", "shards", "many shards"])
def test_transformer_computes_what_diffusers_computes(tmp_path: Path, layout: str) -> None:
    oracle = shake(diffusers_transformer(SMALL))
    if layout == "one file":
        save_file(oracle.state_dict(), tmp_path / "any.safetensors")
        path = tmp_path / "any.safetensors"
    else:
        oracle.save_pretrained(tmp_path, max_shard_size="200KB" if layout == "many shards" else "1MB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        path = tmp_path
    ours = on_meta(VideoRefDiT, SMALL)
    load_weights(ours, path, names="diffusers")
    latents, t, text = small_inputs(SMALL)
    velocity, motion = ours(latents, t, text)
    truth = oracle(latents, 1000 * t, text, return_dict=False)[0]
    assert motion is None
    assert error(velocity, truth) <= LIMIT


@pytest.mark.parametrize("shard_bytes", [None, 300_000])
def test_diffusers_loads_our_transformer(
    tmp_path: Path, shard_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only so that its loader does not ask for one more package; everything here is fp32 anyway.
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    oracle = diffusers_transformer(SMALL)
    ours = shake(VideoRefDiT(SMALL))
    name = "diffusion_pytorch_model.safetensors"
    save_weights(ours, tmp_path / name, names="diffusers", shard_bytes=shard_bytes)
    oracle.save_config(tmp_path)
    assert (tmp_path / name).is_file() == (shard_bytes is None)
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    latents, t, text = small_inputs(SMALL)
    truth = loaded.eval()(latents, 1000 * t, text, return_dict=False)[0]
    assert error(ours(latents, t, text)[0], truth) <= LIMIT


# ---- diffusers' VAE --------------------------------------------------------------------------------------------------

SMALL_VAE = VAEConfig(base_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1, latent_channels=4)


def diffusers_vae(cfg: VAEConfig) -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=cfg.base_dim, z_dim=cfg.latent_channels, dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.num_res_blocks, temperal_downsample=list(cfg.temporal_downsample),
    )  # fmt: skip


def test_vae_computes_what_diffusers_computes(tmp_path: Path) -> None:
    oracle = shake(diffusers_vae(SMALL_VAE))
    oracle.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = on_meta(VideoVAE, SMALL_VAE)
    load_weights(ours, tmp_path, names="diffusers")
    video, z = torch.rand(1, 3, 9, 32, 48) * 2 - 1, torch.randn(1, 4, 3, 4, 6)
    truth = oracle.encode(video).latent_dist
    mean, logvar = ours.encode(video)
    assert error(mean, truth.mean) <= LIMIT
    assert error(logvar.clamp(-30, 20), truth.logvar) <= LIMIT
    assert error(ours.decode(z), oracle.decode(z).sample) <= LIMIT


def test_diffusers_loads_our_vae(tmp_path: Path) -> None:
    oracle, ours = diffusers_vae(SMALL_VAE), shake(VideoVAE(SMALL_VAE))
    save_weights(ours, tmp_path / "diffusion_pytorch_model.safetensors", names="diffusers")
    oracle.save_config(tmp_path)
    loaded, info = diffusers.AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    z = torch.randn(1, 4, 2, 4, 4)
    assert error(ours.decode(z), loaded.eval().decode(z).sample) <= LIMIT


# ---- TAVR's transformer ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tavr(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiTConfig, Path, dict[str, Tensor]]:
    """Its configuration, a checkpoint with its names and dtypes, and the recorded inputs and outputs.

    3 layers, 4 video latents (the first two carried over), a still and 2 reference latents of 8 x 6; weights drawn
    at random in the published dtypes; outputs of TAVR's transformer (Apache-2.0, commit 25f7b39) in fp32.
    """
    with safe_open(FIXTURE, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        cfg = DiTConfig(**json.loads(f.metadata()["config"]))
    path = tmp_path_factory.mktemp("tavr") / "model.safetensors"
    save_file({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, path)
    rest = {k: v for k, v in tensors.items() if not k.startswith("weights.")}
    return cfg, path, rest


def tavr_velocity(model: VideoRefDiT, x: dict[str, Tensor], case: str) -> Tensor:
    """The velocity with the reference's K and V taken from the cache."""
    select, heard = case != "all", case != "null_audio"
    ref_k, ref_v = model.encode_reference(
        x["inputs.reference"], x["inputs.null_text"], x["inputs.reference_audio"] if heard else None,
        rows=x["inputs.reference_rows"] if select else None,
    )  # fmt: skip
    velocity, _ = model(
        x["inputs.latents"], x["inputs.timestep"] / 1000, x["inputs.text"], x["inputs.audio"] if heard else None,
        anchor=x["inputs.anchor"], anchor_rows=x["inputs.anchor_rows"] if select else None, ref_k=ref_k, ref_v=ref_v,
    )  # fmt: skip
    return velocity


@pytest.mark.parametrize("case", ["selected", "all", "null_audio"])
def test_transformer_computes_what_tavr_computes(tavr: tuple, case: str) -> None:
    cfg, path, x = tavr
    model = on_meta(VideoRefDiT, cfg)
    load_weights(model, path, names="tavr", dtype=torch.float32)
    assert error(tavr_velocity(model, x, case), x[f"outputs.{case}"]) <= LIMIT


def test_every_tavr_weight_matters(tavr: tuple) -> None:
    """The recorded case would notice a part that is not computed: each tensor changes the velocity."""
    cfg, path, x = tavr
    model = on_meta(VideoRefDiT, cfg)
    load_weights(model, path, names="tavr", dtype=torch.float32)
    before = tavr_velocity(model, x, "selected")
    unseen = set()
    for name, p in model.named_parameters():
        kept = p.clone()
        p.copy_(p + 0.3 * torch.randn_like(p))
        if error(tavr_velocity(model, x, "selected"), before) <= 3 * LIMIT:
            unseen.add(name)
        p.copy_(kept)
    # What the last block makes of the reference rows is never read, and the case has reference audio.
    last = f"blocks.{cfg.num_layers - 1}.audio_attn."
    silent = {f"{last}{p}_adapter.{i}.{w}" for p in "qkv" for i in (0, 1, 3) for w in ("weight", "bias")}
    assert unseen == {*silent, "null_reference_audio"}


def test_tavr_names_map_both_ways(tavr: tuple, tmp_path: Path) -> None:
    cfg, path, _ = tavr
    model = on_meta(VideoRefDiT, cfg)
    load_weights(model, path, names="tavr")
    save_weights(model, tmp_path / "again.safetensors", names="tavr")
    with safe_open(path, framework="pt") as a, safe_open(tmp_path / "again.safetensors", framework="pt") as b:
        assert set(a.keys()) == set(b.keys())
        for key in a.keys():  # noqa: SIM118
            one, two = a.get_tensor(key), b.get_tensor(key)
            assert one.dtype == two.dtype and torch.equal(one, two), key


# ---- the published sizes ---------------------------------------------------------------------------------------------


def test_wan_1_3b_without_additions_is_wan() -> None:
    cfg = replace(preset("wan_1_3b").dit, **ADDITIONS_OFF)
    with torch.device("meta"):
        theirs = count(diffusers_transformer(cfg))
    assert count(on_meta(VideoRefDiT, cfg)) == theirs == 1_418_996_800


def test_tavr_14b_has_the_published_size() -> None:
    """TAVR's class counts the same; nearly all in bf16, that is its published 37.8 GB."""
    assert count(on_meta(VideoRefDiT, preset("tavr_14b").dit)) == 18_905_907_264


@pytest.mark.parametrize("name", ["wan_1_3b", "tavr_14b"])
def test_big_presets_build_on_meta(name: str) -> None:
    cfg = preset(name)
    assert all(p.is_meta for p in on_meta(VideoRefDiT, cfg.dit).parameters())
    vae = on_meta(VideoVAE, cfg.vae)
    assert all(p.is_meta for p in vae.parameters())
    with torch.device("meta"):
        assert count(vae) == count(diffusers_vae(cfg.vae))
