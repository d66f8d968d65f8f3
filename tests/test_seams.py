"""The measure of chunk seams tells a video with seams from one without; a chunk's level is held where it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from avatar_rt.config import ChunkConfig
from avatar_rt.errors import InputError
from avatar_rt.media.writer import VideoWriter
from avatar_rt.pipeline.schedule import level
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
