"""The reference's face in the solver's estimate: where, when, whose, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import small_bundle
import torch

from avatar_rt import AvatarEngine
from avatar_rt.config import SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.pipeline.denoise import solve
from avatar_rt.pipeline.likeness import Likeness, face_mask

MASK = torch.zeros(1, 1, 1, 4, 4)
MASK[..., 1:3, 1:3] = 1


def _likeness(times: tuple[float, ...] = (0.8,), motion: bool = True) -> Likeness:
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 3, 5, 4, 4, generator=g)
    return Likeness(times, latents, torch.randn(1, 5, 6, generator=g) if motion else None, MASK)


def test_the_face_is_the_references_and_the_rest_is_an_euler_step() -> None:
    lent = _likeness()
    z, v = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 2, 4, 4)
    motion = lent.motion[:, [4, 1]] + 0.01
    out = lent.step(z, v, 0.9, 0.7, motion)
    clean = (out - 0.7 * (z + 0.1 * v)) / 0.3
    inside = MASK.bool().expand_as(z)
    assert torch.allclose(clean[inside], lent.latents[:, :, [4, 1]][inside], atol=1e-5)
    assert torch.allclose(out[~inside], (z - 0.2 * v)[~inside], atol=1e-6)


def test_without_motion_the_nearest_face_is_taken() -> None:
    lent = _likeness(motion=False)
    clean = lent.latents[:, :, [3, 0]] + 0.1 * torch.randn(1, 3, 2, 4, 4)
    clean = torch.where(MASK.bool(), clean, 9.0)  # what lies outside of the face says nothing
    assert torch.equal(lent.faces(clean, None), lent.latents[:, :, [3, 0]])


def test_each_time_counts_once() -> None:
    lent = _likeness((0.9, 0.75))
    times = (1.0, 0.9, 0.8, 0.7, 0.0)
    assert [lent.applies(a, b) for a, b in pairwise(times)] == [True, False, True, False]


@pytest.mark.parametrize("n", [0, 1])
def test_carried_latents_stay_as_they_are(n: int) -> None:
    cfg = dataclasses.replace(small_bundle.CONFIG.dit, latent_channels=3)
    z, motion = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 2, 6)

    def still(rows, t, m):
        return torch.zeros_like(z), torch.zeros_like(motion)

    out, _ = solve(still, cfg, z, motion, [1.0, 0.7, 0.0], n, likeness=_likeness())
    assert torch.equal(out[:, :, :n], z[:, :, :n])
    assert not torch.equal(out[:, :, n:], z[:, :, n:])


def test_the_mask_has_the_face_without_the_mouth() -> None:
    mask = face_mask(16, 16)
    assert mask.shape == (16, 16) and mask.min() >= 0 and mask.max() <= 1
    assert mask[6, 6] == 1 and mask[6, 9] == 1  # eyes
    assert mask[10, 7] < 0.1 and mask[10, 8] < 0.1  # mouth
    assert not mask[:2].any() and not mask[:, :3].any() and not mask[:, 13:].any()
    assert torch.allclose(mask, mask.flip(1))


def test_a_request_may_turn_it_off_or_move_it(tmp_path) -> None:
    sampling = dataclasses.replace(small_bundle.CONFIG.sampling, likeness=(0.8,))
    path = small_bundle.write_bundle(tmp_path / "bundle", spread=0.1, height=64, width=64, sampling=sampling)
    engine = AvatarEngine(path)
    assert engine.config.sampling.likeness == (0.8,)
    rng = np.random.default_rng(0)
    reference = engine.prepare(rng.integers(0, 256, (17, 64, 64, 3), np.uint8), cropped=True)

    def frames(**options) -> np.ndarray:
        session = engine.session(reference, **options)
        session.push_audio(np.full(8000, 0.1, np.float32))
        session.end_audio()
        return np.concatenate(list(session.frames()))

    usual, off = frames(), frames(likeness=())
    assert np.array_equal(usual, frames(likeness=[0.8])) and np.array_equal(usual, frames(likeness=(0.8,)))
    assert not np.array_equal(usual, off)


@pytest.mark.parametrize("times", [(1.0,), (0.5, 0.0), (-0.1,)])
def test_a_time_that_is_none_is_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="likeness: expected flow times between 0 and 1"):
        SamplingConfig(likeness=times)
