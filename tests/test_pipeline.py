"""The stages' arithmetic: times, guidance, chunks, noise; and a chunk that does not depend on where a run was cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from avatar_rt import ops
from avatar_rt.config import MOTION_CHANNELS, ChunkConfig, MotionConfig, SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.pipeline.decode import motion_of
from avatar_rt.pipeline.denoise import LatentChunk
from avatar_rt.pipeline.schedule import flow_times, guidance_passes, make_schedule
from avatar_rt.scene.image import blank_head, latent_mask


def _shift(t: float, s: float) -> float:
    return s * t / (1 + (s - 1) * t)


def test_times_run_from_noise_to_data() -> None:
    times = flow_times(7, 3.0)
    assert times[0] == 1.0 and times[-1] == 0.0 and len(times) == 8
    assert all(a > b for a, b in itertools.pairwise(times))
    assert flow_times(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(InputError, match="steps: expected at least 1, got 0"):
        flow_times(0, 3.0)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0])
def test_shift_is_a_group(t: float) -> None:
    assert _shift(_shift(t, 2.0), 3.0) == pytest.approx(_shift(t, 6.0), abs=1e-12)
    assert _shift(t, 1.0) == t


def _solved(steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and deviation that Euler reaches from noise with the closed-form velocity of N(mean, std^2) data."""
    z = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = flow_times(steps, 3.0)
    for t, t_next in itertools.pairwise(times):
        noise = (z - (1 - t) * mean) / (((1 - t) * std) ** 2 + t**2)
        z = ops.flow_step(z, t * noise - (mean + (1 - t) * std**2 * noise), t, t_next)
    return float(z.mean()), float(z.std())


def test_euler_on_gaussian_data_converges_to_its_distribution() -> None:
    """First order: four times the steps, a quarter of the error."""
    coarse, fine = (_solved(steps, 1.5, 0.5) for steps in (32, 128))
    assert fine[0] == pytest.approx(1.5, abs=0.01)
    assert abs(fine[1] - 0.5) < 0.015
    assert abs(fine[1] - 0.5) < 0.3 * abs(coarse[1] - 0.5)


def _scales(r: float, a: float, t: float) -> SamplingConfig:
    return SamplingConfig(reference_scale=r, audio_scale=a, text_scale=t)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.5, 2.0, 3.0), (0.5, 1.0, 4.0)])
def test_guidance_is_nested(scales: tuple[float, float, float]) -> None:
    """The collected passes equal v0 + r (vr - v0) + a (vra - vr) + t (vrat - vra)."""
    v = {(False, False, False): 0.3, (True, False, False): -1.0, (True, True, False): 2.0, (True, True, True): 0.7}
    v0, vr, vra, vrat = v.values()
    r, a, t = scales
    passes = guidance_passes(_scales(*scales), has_text=True)
    total = sum(p.weight * v[p.reference, p.audio, p.text] for p in passes)
    assert total == pytest.approx(v0 + r * (vr - v0) + a * (vra - vr) + t * (vrat - vra))


def test_guidance_of_one_is_the_conditioned_pass() -> None:
    (only,) = guidance_passes(_scales(1.0, 1.0, 1.0), has_text=True)
    assert (only.weight, only.reference, only.audio, only.text) == (1.0, True, True, True)
    assert [p.text for p in guidance_passes(_scales(2.0, 2.0, 5.0), has_text=False)] == [False, False]


@pytest.mark.parametrize("has_text", [False, True])
def test_the_motion_may_have_a_guidance_of_its_own(has_text: bool) -> None:
    """v_r + s (v_rat - v_r), whatever guides the picture; only passes that somebody needs are run."""
    scales = dataclasses.replace(_scales(3.0, 2.5, 4.0), motion_audio_scale=1.25)
    passes = guidance_passes(scales, has_text)
    assert sum(p.weight for p in passes) == pytest.approx(1)
    motion = {(p.reference, p.audio, p.text): p.motion_weight for p in passes if p.motion_weight}
    assert motion == pytest.approx({(True, False, False): -0.25, (True, True, has_text): 1.25})
    (only,) = guidance_passes(dataclasses.replace(_scales(1.0, 1.0, 1.0), motion_audio_scale=1.0), has_text)
    assert only.motion_weight == 1


def test_the_motions_noise_has_a_temperature() -> None:
    cold, warm = (
        make_schedule(SamplingConfig(motion_temperature=t), ChunkConfig(), 3, has_text=False) for t in (0.5, 1.0)
    )
    plan = warm.plan(0)
    assert torch.equal(cold.noise(plan, 0, (2,)), warm.noise(plan, 0, (2,)))
    assert torch.equal(cold.noise(plan, 1, (2,)), 0.5 * warm.noise(plan, 1, (2,)))
    with pytest.raises(InputError, match="motion_temperature: expected a number from 0 to 1, got 2"):
        SamplingConfig(motion_temperature=2)


def test_chunks_overlap_and_never_end() -> None:
    schedule = make_schedule(SamplingConfig(steps=2), ChunkConfig(latents=8, overlap=2), 0, has_text=False)
    plans = [schedule.plan(i) for i in range(4)]
    assert [(p.start, p.overlap, p.latents) for p in plans] == [(0, 0, 8), (6, 2, 8), (12, 2, 8), (18, 2, 8)]


def test_noise_belongs_to_the_absolute_latent() -> None:
    schedule = make_schedule(SamplingConfig(steps=2), ChunkConfig(latents=8, overlap=2), 5, has_text=False)
    first, second = (schedule.noise(schedule.plan(i), 0, (4, 2, 2)) for i in (0, 1))
    assert torch.equal(first[6:], second[:2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, schedule.noise(schedule.plan(0), 1, (4, 2, 2)))
    other = make_schedule(SamplingConfig(steps=2), ChunkConfig(latents=8, overlap=2), 6, has_text=False)
    assert not torch.equal(first, other.noise(other.plan(0), 0, (4, 2, 2)))


def test_motion_is_told_of_the_frames_that_are_shown() -> None:
    torch.manual_seed(0)
    encoder = MotionEncoder(MotionConfig(size=32, base_dim=8))
    encoder.mean.fill_(1.0)
    encoder.std.fill_(2.0)
    tokens = torch.arange(8.0).view(1, 2, 4, 1).expand(-1, -1, -1, MOTION_CHANNELS).flatten(2)
    latents = torch.zeros(1, 16, 2, 4, 4)
    told = motion_of(encoder, LatentChunk(latents, tokens, 0, 3), 5)  # three of the first latent's lie before the video
    assert told is not None and told[:, 0].tolist() == [7, 9, 11, 13, 15] and told.shape == (5, MOTION_CHANNELS)
    assert motion_of(encoder, LatentChunk(latents, None, 0), 5) is None
    assert motion_of(encoder, LatentChunk(latents, tokens[..., :6], 0), 5) is None


def test_blanked_head_leaves_the_place() -> None:
    import numpy as np

    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    out, kept = blank_head(image)
    assert (out[~kept] == 127).all() and (out[kept] == image[kept]).all()
    assert 0.3 < kept.mean() < 0.8 and not kept[32, 32]
    mask = latent_mask(kept, 8, 8)
    assert mask.shape == (8, 8) and not mask[4, 4] and mask[7, 0]
    assert kept.reshape(8, 8, 8, 8).all((1, 3))[mask].all()


def test_a_continued_chunk_is_not_driven_towards_the_reference_again() -> None:
    """The first chunk has every pass; a later one less reference guidance, and as much audio."""
    sampling = SamplingConfig(reference_scale=3.0, audio_scale=2.5)
    schedule = make_schedule(sampling, ChunkConfig(8, 2), 0, has_text=False)
    assert [(p.weight, p.reference, p.audio) for p in schedule.passes_of(schedule.plan(0))] == [
        (-2.0, False, False), (0.5, True, False), (2.5, True, True),
    ]  # fmt: skip
    later = [(p.weight, p.reference, p.audio) for p in schedule.passes_of(schedule.plan(1))]
    assert later == [(-1.5, True, False), (2.5, True, True)]
    free = make_schedule(dataclasses.replace(sampling, carried_scale=5.0), ChunkConfig(8, 2), 0, has_text=False)
    assert free.passes_of(free.plan(1)) == free.passes
