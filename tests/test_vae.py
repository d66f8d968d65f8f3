"""The causal VAE: the published mathematics, streams that equal whole clips, states of fixed shape, clear refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from avatar_rt.config import VAEConfig, preset
from avatar_rt.errors import InputError
from avatar_rt.models.vae import VideoVAE, vae_names

SMALL = VAEConfig(base_dim=8, dim_mult=(1, 2, 4, 4), num_res_blocks=1)
PATCHED = VAEConfig(base_dim=8, encoder_base_dim=16, dim_mult=(1, 2, 2), temporal_downsample=(True, True), patch=2)
FLAT = replace(PATCHED, time_kernel=(1, 1, 3))
LIMIT = 1e-5


def random_vae(cfg: VAEConfig) -> VideoVAE:
    """A VAE in which no norm weight is 1 and no bias is 0."""
    vae = VideoVAE(cfg).eval().requires_grad_(False)
    for p in vae.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return vae


def oracle(cfg: VAEConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    channels = 3 * cfg.patch**2
    return diffusers.AutoencoderKLWan(
        base_dim=cfg.encoder_base_dim or cfg.base_dim, decoder_base_dim=cfg.base_dim, z_dim=cfg.latent_channels,
        dim_mult=list(cfg.dim_mult), num_res_blocks=cfg.num_res_blocks, in_channels=channels, out_channels=channels,
        temperal_downsample=list(cfg.temporal_downsample), patch_size=cfg.patch if cfg.patch > 1 else None,
    ).eval().requires_grad_(False)  # fmt: skip


def relative_error(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape
    return float((ours - truth).abs().max() / truth.abs().max())


def decode_in_steps(vae: VideoVAE, z: Tensor, sizes: list[int]) -> tuple[Tensor, list[list[tuple[int, ...]]]]:
    state, videos, shapes = None, [], []
    for part in z.split(sizes, dim=2):
        video, state = vae.decode_step(part, state)
        videos.append(video)
        shapes.append([tuple(s.shape) for s in state])
    return torch.cat(videos, dim=2), shapes


@pytest.mark.parametrize("cfg", [SMALL, PATCHED], ids=["wan", "patched"])
def test_computes_what_diffusers_computes(cfg: VAEConfig) -> None:
    vae, truth = random_vae(cfg), oracle(cfg)
    names = vae_names(cfg)
    assert sorted(names.values()) == sorted(truth.state_dict())
    truth.load_state_dict({names[k]: v for k, v in vae.state_dict().items()})
    video = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    posterior = truth.encode(video).latent_dist
    mean, logvar = vae.encode(video)
    assert relative_error(mean, posterior.mean) <= LIMIT
    assert relative_error(logvar.clamp(-30, 20), posterior.logvar) <= LIMIT
    assert relative_error(vae.decode(posterior.mean), truth.decode(posterior.mean).sample) <= LIMIT


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 1, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("cfg", [SMALL, PATCHED, FLAT], ids=["wan", "patched", "flat"])
def test_decoding_in_steps_equals_decoding_at_once(cfg: VAEConfig, sizes: list[int]) -> None:
    vae = random_vae(cfg)
    z = torch.randn(2, 16, 4, 3, 4)
    whole = vae.decode(z)
    stepped, _ = decode_in_steps(vae, z, sizes)
    assert whole.shape == (2, 3, 13, 24, 32)
    assert (stepped - whole).abs().max() <= LIMIT


@pytest.mark.parametrize("cfg", [SMALL, PATCHED], ids=["wan", "patched"])
def test_encoding_in_steps_equals_encoding_at_once(cfg: VAEConfig) -> None:
    vae = random_vae(cfg)
    video = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    state, means = None, []
    for part in video.split([1, 4, 8, 4], dim=2):
        mean, _, state = vae.encode_step(part, state)
        means.append(mean)
    assert (torch.cat(means, dim=2) - vae.encode(video)[0]).abs().max() <= LIMIT


def test_latents_depend_on_no_later_frame() -> None:
    vae = random_vae(SMALL)
    video = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    changed = video.clone()
    changed[:, :, 9:] = 0
    torch.testing.assert_close(vae.encode(changed)[0][:, :, :3], vae.encode(video)[0][:, :, :3], rtol=0, atol=1e-6)


def test_state_shapes_are_fixed_and_inputs_untouched() -> None:
    vae = random_vae(PATCHED)
    z = torch.randn(1, 16, 5, 2, 2)
    _, shapes = decode_in_steps(vae, z, [1, 1, 2, 1])
    assert all(s == shapes[0] for s in shapes)
    assert len(shapes[0]) == vae.num_decoder_states
    _, state = vae.decode_step(z[:, :, :1], None)
    kept = [s.clone() for s in state]
    first, _ = vae.decode_step(z[:, :, 1:2], state)
    second, _ = vae.decode_step(z[:, :, 1:2], state)
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))
    assert torch.equal(first, second)


def test_streams_share_weights_but_no_state() -> None:
    vae = random_vae(SMALL)
    a, b = torch.randn(2, 1, 16, 3, 2, 2).unbind(0)
    states: list = [None, None]
    videos: list[list[Tensor]] = [[], []]
    for k in range(3):
        for i, z in enumerate((a, b)):
            video, states[i] = vae.decode_step(z[:, :, k : k + 1], states[i])
            videos[i].append(video)
    for z, parts in zip((a, b), videos, strict=True):
        assert (torch.cat(parts, dim=2) - vae.decode(z)).abs().max() <= LIMIT


def test_gradients_reach_every_parameter() -> None:
    vae = VideoVAE(PATCHED)
    mean, logvar = vae.encode(torch.rand(1, 3, 9, 16, 16))
    video, _ = vae.decode_unclamped(mean + logvar, None)
    video.square().mean().backward()
    # A bias in front of a norm, and a key's bias in attention, may have a tiny gradient, but each must have one.
    assert [n for n, p in vae.named_parameters() if p.grad is None] == []


def test_bf16_weights_and_inputs() -> None:
    vae = random_vae(PATCHED)
    z = torch.randn(1, 16, 2, 4, 4)
    exact = vae.decode(z)
    rough = vae.bfloat16().decode(z.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.02


def test_full_size_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        vae = VideoVAE(preset("wan_1_3b").vae)
        mean, _ = vae.encode(torch.empty(1, 3, 5, 64, 64))
        video = vae.decode(mean)
    assert mean.shape == (1, 16, 2, 8, 8)
    assert video.shape == (1, 3, 5, 64, 64)
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531  # Wan 2.1's published VAE


def test_normalised_latents() -> None:
    z = torch.randn(1, 16, 2, 2, 2)
    assert VideoVAE(SMALL).normalize(z) is z
    cfg = replace(SMALL, latent_mean=tuple(range(16)), latent_std=tuple(range(1, 17)))
    vae = VideoVAE(cfg)
    torch.testing.assert_close(vae.normalize(z)[0, 3], (z[0, 3] - 3) / 4)
    torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16, 16), r"video: expected 1 \+ 4k frames, got 8"),
        ((1, 3, 5, 16, 20), "video: expected height and width in multiples of 8, got 16 x 20"),
        ((1, 4, 5, 16, 16), r"video: expected \[B, 3, F, H, W\], got \[1, 4, 5, 16, 16\]"),
        ((3, 5, 16, 16), r"video: expected \[B, 3, F, H, W\], got \[3, 5, 16, 16\]"),
        ((1, 3, 0, 16, 16), r"video: expected 1 \+ 4k frames, got 0"),
    ],
)
def test_encoding_refuses(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VideoVAE(SMALL).encode(torch.zeros(shape))


def test_decoding_refuses() -> None:
    vae = VideoVAE(SMALL)
    with pytest.raises(InputError, match=r"z: expected \[B, 16, T >= 1, h, w\], got \[1, 4, 1, 2, 2\]"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(InputError, match=r"state: expected \d+ tensors, got 1"):
        vae.decode_step(torch.zeros(1, 16, 1, 2, 2), (torch.zeros(1),))
    state = vae.encode_step(torch.zeros(1, 3, 1, 16, 16), None)[2]
    with pytest.raises(InputError, match="expected a multiple of 4 frames after the start of a stream, got 5"):
        vae.encode_step(torch.zeros(1, 3, 5, 16, 16), state)
