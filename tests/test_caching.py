"""The cache saves what arithmetic says: rows a step goes from G + R to G, and FLOPs with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_bundle import CONFIG, write_bundle

from avatar_rt import AvatarEngine
from avatar_rt.__main__ import SAMPLES
from bench import caching

STEPS = 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AvatarEngine:
    sampling = dataclasses.replace(CONFIG.sampling, steps=STEPS, audio_scale=1.0)
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "small", sampling=sampling)
    return AvatarEngine(bundle, dtype=torch.float32)  # recorded kernels call no hooks


def _rows(engine: AvatarEngine, *, use_cache: bool) -> list[int]:
    """Rows that go through each block's feed-forward or key projection in one chunk of one pass a step."""
    reference = engine.prepare(SAMPLES / "reference.mp4")
    session = engine.session(reference, use_cache=use_cache)
    counts = [0] * len(engine.dit.blocks)
    hooks = [
        block.self_attn.k.register_forward_hook(
            lambda m, given, out, i=i: counts.__setitem__(i, counts[i] + out.shape[:-1].numel())
        )
        for i, block in enumerate(engine.dit.blocks)
    ]
    session.push_audio(np.zeros(16_000, np.float32))
    session.end_audio()
    next(session.frames())
    for hook in hooks:
        hook.remove()
    return counts


def test_rows_of_a_step_drop_from_g_and_r_to_g(engine: AvatarEngine) -> None:
    cfg = engine.config
    size = cfg.tokens_per_frame + 1  # a motion token a frame
    g = cfg.chunk.latents * size + cfg.tokens_per_frame  # and the scene
    r = cfg.reference_latents * size
    assert _rows(engine, use_cache=True) == [STEPS * g] * cfg.dit.num_layers
    assert _rows(engine, use_cache=False) == [STEPS * (g + r)] * cfg.dit.num_layers


def test_flops_are_what_the_sizes_say() -> None:
    cfg = dataclasses.replace(caching.CONFIG, dim=32, ffn_dim=64, num_heads=2, num_layers=3)
    found = caching.measure(1, 1, cfg)
    c, f, g, r, s = cfg.dim, cfg.ffn_dim, found["g"], found["r"], cfg.text_len
    # q, k, v, o; q, o of the text attention and its scores; feed-forward. What is left is small: modulation, text.
    row = 2 * (6 * c * c + 2 * c * f) + 4 * s * c
    cached = cfg.num_layers * (g * row + 4 * c * g * (g + r))
    own = (cfg.num_layers - 1) * (r * row + 4 * c * r * r) + r * 2 * 3 * c * c
    assert found["cached_gflop"] * 1e9 == pytest.approx(cached, rel=0.15)
    assert (found["recomputed_gflop"] - found["cached_gflop"]) * 1e9 == pytest.approx(own, rel=0.15)
    assert found["r"] == 4 * found["g"]
