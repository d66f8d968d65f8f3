"""The measure of chunk seams tells a video with seams from one without; a chunk's level is held where it was."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_bundle import CONFIG

from avatar_rt.config import ChunkConfig
from avatar_rt.errors import InputError
from avatar_rt.media.writer import VideoWriter
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.vae import VideoVAE
from avatar_rt.pipeline.decode import decode_chunk, still_of, to_pictures
from avatar_rt.pipeline.denoise import ChunkState, Conditions, LatentChunk, Scene, denoise_chunk
from avatar_rt.pipeline.reference import ReferenceCache
from avatar_rt.pipeline.schedule import level, make_schedule
from bench.quality.seams import main, seam_frames, seams

CHUNK = ChunkConfig(latents=8, overlap=2)


def test_where_seams_are() -> None:
    assert seam_frames(CHUNK, 80).tolist() == [29, 53, 77]
    with pytest.raises(InputError, match="at least 4 chunks"):
        seams(np.ones(60), CHUNK)


@pytest.mark.parametrize(("jump", "shows"), [(0.0, False), (1.0, True)])
def test_a_jump_at_each_seam_shows(jump: float, shows: bool) -> None:
    change = 1 + 0.3 * np.random.default_rng(3).standard_normal(1500).clip(-3, 3)
    change[seam_frames(CHUNK, 1501) - 1] += jump
    found = seams(change, CHUNK)
    assert found.shows is shows and found.count == 62
    assert (abs(found.excess) < 0.1) is not shows
    assert found.low <= found.excess <= found.high


def test_a_video_with_seams(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, frames = np.random.default_rng(0), np.zeros((160, 48, 64, 3), np.uint8)
    bright = np.cumsum(rng.uniform(0.5, 1.0, 160)) + 20 * np.searchsorted(seam_frames(CHUNK, 160), range(160), "right")
    frames[:] = bright.clip(0, 255).astype(np.uint8)[:, None, None, None]
    with VideoWriter(tmp_path / "v.mp4", (48, 64)) as writer:
        writer.write(frames)
    assert main([str(tmp_path / "v.mp4")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shows"] and told["count"] == 6 and told["seam"] > 10 * told["inside"]


def test_level_is_of_places_behind_and_of_the_whole_head() -> None:
    z = torch.randn(1, 4, 6, 8, 8)
    kept = torch.ones(1, 1, 1, 8, 8)
    kept[..., 2:6, 2:6] = 0
    found = level(z, kept)
    assert torch.allclose(found[..., 0, 0], z[..., 0, 0].mean(2, keepdim=True))
    assert torch.allclose(found[0, :, 0, 3, 4], z[0, :, :, 2:6, 2:6].mean((1, 2, 3)), atol=1e-6)
    # A shift of the places, and one of the head, is all taken back; what moves in it stays.
    drift = torch.randn(1, 4, 1, 8, 8) * kept + torch.randn(1, 4, 1, 1, 1) * (1 - kept)
    assert torch.allclose(z + drift + found - level(z + drift, kept), z, atol=1e-5)
    assert torch.isfinite(level(z, torch.ones_like(kept))).all()


@torch.no_grad()
def test_the_step_across_a_seam_is_eased() -> None:
    """Of what separates the first new latent from the last carried one, the share ``ease`` is gone; then its square."""
    torch.manual_seed(0)
    d, (h, w), keep = CONFIG.dit, CONFIG.latent_size, CONFIG.chunk.overlap
    dit, empty = VideoRefDiT(d).eval(), torch.zeros(1, d.text_len, d.text_dim)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    cache = ReferenceCache(*dit.encode_reference(torch.randn(1, d.in_channels, 2, h, w), empty))
    place = Scene(torch.randn(1, d.latent_channels, 1, h, w), torch.ones(1, 1, 1, h, w))
    schedule = make_schedule(CONFIG.sampling, CONFIG.chunk, 0, has_text=False)

    def chunk(index: int, state: ChunkState, ease: float) -> tuple[torch.Tensor, ChunkState]:
        plan = schedule.plan(index)
        frames = 4 * plan.latents - (0 if index else 3)
        given = Conditions(place, torch.ones(1, frames, d.audio_dim), empty, empty)
        cfg = dataclasses.replace(CONFIG, chunk=dataclasses.replace(CONFIG.chunk, ease=ease))
        done = denoise_chunk(dit, cfg, schedule, plan, state, lambda: cache, given)
        assert done is not None
        return done[0].latents, done[1]

    first, state = chunk(0, ChunkState(), 0.5)
    assert torch.equal(first, chunk(0, ChunkState(), 0.0)[0])  # there is no seam before it
    plain, eased = chunk(1, state, 0.0)[0], chunk(1, state, 0.5)
    step = first[:, :, -1] - plain[:, :, 0]
    assert step.abs().mean() > 0.05
    for k in range(plain.shape[2]):
        assert torch.allclose(eased[0][:, :, k], plain[:, :, k] + 0.5 ** (k + 1) * step, atol=1e-5)
    assert torch.equal(eased[1].latents, eased[0][:, :, -keep:])  # what is shown is what is carried on


@torch.no_grad()
def test_a_led_in_video_begins_with_a_latent_like_the_others() -> None:
    """Its first latent holds four frames, of which the last is the video's first; its anchor is a still."""
    vae, cfg = VideoVAE(CONFIG.vae).eval(), CONFIG
    schedule = make_schedule(cfg.sampling, ChunkConfig(latents=3, overlap=1, lead_in=True), 0, has_text=False)
    plain = make_schedule(cfg.sampling, ChunkConfig(latents=3, overlap=1), 0, has_text=False)
    assert [schedule.frames_of(schedule.plan(i), 4) for i in (0, 1)] == [range(-3, 9), range(5, 17)]
    assert [plain.frames_of(plain.plan(i), 4) for i in (0, 1)] == [range(9), range(5, 17)]
    z = torch.randn(1, cfg.dit.latent_channels, 3, *cfg.latent_size)
    _, before = vae.decode_step(z[:, :, :1], None)
    video, after = vae.decode_step(z, before)
    pictures, state = decode_chunk(vae, LatentChunk(z, None, 0, lead=3), None)
    assert pictures.start == 0 and torch.equal(pictures.frames, to_pictures(video[0, :, 3:], 1))
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    still = vae.normalize(vae.encode(video[:, :, 3:4])[0])
    assert torch.allclose(still_of(vae, z[:, :, :1]), still, atol=1e-5)
