"""The recorded decoder: the VAE's own frames, however a stream is cut and whoever decoded its beginning."""

from __future__ import annotations

import pytest
import torch
from tolerance import typical

from avatar_rt.config import VAEConfig
from avatar_rt.errors import InputError
from avatar_rt.models.streamed import StreamedVAE, refuses_streamed
from avatar_rt.models.vae import VideoVAE
from avatar_rt.ops.program import refuses_program
from bench.baseline import PlainDecoder

SMALL = VAEConfig(
    base_dim=16, encoder_base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True),
    latent_channels=16, patch=2, time_kernel=(1, 1, 1),
)  # fmt: skip
REASON = refuses_program(torch.device("cpu"), torch.bfloat16)
needs_kernels = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def _vae() -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(SMALL).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 and "norm" not in name else 0.3)
    return vae


@needs_kernels
@torch.no_grad()
def test_frames_are_the_modules() -> None:
    vae, z = _vae(), torch.randn(1, 16, 4, 4, 6)
    truth, state = vae.decode_step(z, None)
    got, after = StreamedVAE(vae).decode_step(z, None)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = PlainDecoder(vae, torch.bfloat16)(z, None)
    assert got.shape == truth.shape and truth.std() > 0.05
    assert typical(got, truth.double()) <= 2 * typical(plain, truth.double())
    assert [s.shape for s in after] == [s.shape for s in state]


@needs_kernels
@torch.no_grad()
def test_any_cut_gives_the_same_bits_and_streams_do_not_mix() -> None:
    streamed, z, other = StreamedVAE(_vae()), torch.randn(1, 16, 5, 4, 4), torch.randn(1, 16, 5, 4, 4)
    whole, _ = streamed.decode_step(z, None)
    pieces, state = [], None
    for cut in (slice(0, 1), slice(1, 3), slice(3, 5)):
        video, state = streamed.decode_step(z[:, :, cut], state)
        streamed.decode_step(other, None)
        pieces.append(video)
    assert torch.equal(whole, torch.cat(pieces, 2))


@needs_kernels
@torch.no_grad()
def test_a_stream_may_change_decoders() -> None:
    vae, z = _vae(), torch.randn(1, 16, 4, 4, 4)
    streamed = StreamedVAE(vae)
    truth = vae.decode(z)
    _, state = vae.decode_step(z[:, :, :2], None)
    rest, _ = streamed.decode_step(z[:, :, 2:], state)
    assert typical(rest, truth[:, :, -rest.shape[2] :].double()) < 0.02
    _, state = streamed.decode_step(z[:, :, :2], None)
    rest, _ = vae.decode_step(z[:, :, 2:], state)
    assert typical(rest, truth[:, :, -rest.shape[2] :].double()) < 0.02


@needs_kernels
def test_wrong_input_is_said() -> None:
    streamed = StreamedVAE(_vae())
    with pytest.raises(InputError, match=r"z: expected \[1, 16, T >= 1, h, w\]"):
        streamed.decode_step(torch.zeros(1, 4, 1, 4, 4), None)
    with pytest.raises(InputError, match="state: expected 1 tensors, got 0"):
        streamed.decode_step(torch.zeros(1, 16, 1, 4, 4), ())


def test_who_is_refused() -> None:
    assert refuses_streamed(VideoVAE(SMALL)) is None
    deep = VideoVAE(VAEConfig(base_dim=16, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True)))
    assert "time_kernel" in (refuses_streamed(deep) or "")
    narrow = VideoVAE(
        VAEConfig(
            base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), time_kernel=(1, 1, 1)
        )
    )
    assert "widths [8]" in (refuses_streamed(narrow) or "")
