"""The arithmetic of flow matching against closed forms: where the answer is known, the code has to give it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_stages import CFG, build

from avatar_rt.config import SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import with_masks
from avatar_rt.ops import flow_step
from avatar_rt.pipeline.denoise import ChunkState, Conditions, Scene, denoise_chunk
from avatar_rt.pipeline.reference import ReferenceCache
from avatar_rt.pipeline.schedule import flow_times, guidance_passes, make_schedule
from training.methods import flow
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.methods.t2v import T2VMethod, T2VSettings

ONE = (Bucket(3, people=2, windows=2),)


# ---- the path --------------------------------------------------------------------------------------------------


def _gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [3] and covariance [3, 3]."""
    a = torch.tensor([[1.0, 0.2, 0.0], [-0.5, 0.7, 0.1], [0.3, 0.0, 0.4]], dtype=torch.float64)
    return torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64), a @ a.T


def _exact_velocity(z: torch.Tensor, t: float, mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    """E[noise - x | z_t = z] for x ~ N(mean, cov): linear in z."""
    eye = torch.eye(3, dtype=torch.float64)
    spread = (1 - t) ** 2 * cov + t**2 * eye
    gain = torch.linalg.solve(spread, t * eye - (1 - t) * cov)
    return (z - (1 - t) * mean) @ gain - mean  # gain is symmetric: both its factors are functions of cov


def test_the_loss_is_least_at_the_exact_velocity_of_a_gaussian() -> None:
    """The regression's minimum is E[v | z], and what is left there is the variance that nothing can predict."""
    mean, cov = _gaussian()
    g = torch.Generator().manual_seed(0)
    root, t = torch.linalg.cholesky(cov), 0.6
    x = mean + torch.randn(200_000, 3, generator=g, dtype=torch.float64) @ root.mT
    noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
    z = flow.noised(x, noise, torch.tensor(t, dtype=torch.float64))
    target = flow.velocity(x, noise)
    exact = _exact_velocity(z, t, mean, cov)
    design = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
    fitted = design @ torch.linalg.lstsq(design, target).solution  # the best that is linear, which is the best of all
    assert float((fitted - exact).square().mean().sqrt()) < 0.02
    best = float((exact - target).square().mean())
    for other in (exact * 1.05, exact + 0.1, target.roll(1, 0)):
        assert float((other - target).square().mean()) > best
    # v = noise - x has covariance I + S, and C = t I - (1 - t) S with z, which has P: what is left is I + S - C P^-1 C.
    eye = torch.eye(3, dtype=torch.float64)
    cross, spread = t * eye - (1 - t) * cov, (1 - t) ** 2 * cov + t**2 * eye
    left = torch.trace(eye + cov - cross @ torch.linalg.solve(spread, cross)) / 3
    assert best == pytest.approx(float(left), rel=0.01)


def test_euler_reaches_the_gaussian_with_an_error_of_one_over_the_steps() -> None:
    """The solver's map is affine, so its end's mean and covariance are exact; halving the step halves the distance."""
    mean, cov = _gaussian()
    errors = []
    for steps in (32, 64, 128, 256):
        m, root = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        for t, t_next in pairwise(flow_times(steps, 3.0)):
            moved = flow_step(m[None], _exact_velocity(m[None], t, mean, cov), t, t_next)[0]
            columns = [
                flow_step((m + c)[None], _exact_velocity((m + c)[None], t, mean, cov), t, t_next)[0] - moved
                for c in root.unbind(1)
            ]
            m, root = moved, torch.stack(columns, 1)
        end = root @ root.mT
        # Gelbrich's form of the Wasserstein distance between two normals.
        vals, vecs = torch.linalg.eigh(cov)
        half = vecs @ vals.sqrt().diag() @ vecs.mT
        inner = torch.linalg.eigvalsh(half @ end @ half).clamp(min=0).sqrt().sum()
        square = (m - mean).square().sum() + torch.trace(end) + torch.trace(cov) - 2 * inner
        errors.append(math.sqrt(max(float(square), 0.0)))
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, abs=0.25)


def test_data_and_noise_recombine() -> None:
    g = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 5, 7, 3, generator=g)
    t = torch.rand(5, 1, 1, generator=g)
    z, v = flow.noised(x, noise, t), flow.velocity(x, noise)
    assert float((flow.data_of(z, v, t) - x).abs().max()) < 1e-6
    assert float((flow.noise_of(z, v, t) - noise).abs().max()) < 1e-6
    guess = torch.randn(v.shape, generator=g)  # for any velocity, right or wrong
    again = flow.noised(flow.data_of(z, guess, t), flow.noise_of(z, guess, t), t)
    assert float((again - z).abs().max()) < 1e-6


def test_shift_is_a_group() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for a, b in ((3.0, 2.0), (0.5, 7.0), (1.7, 1 / 1.7)):
        torch.testing.assert_close(flow.shift(flow.shift(t, a), b), flow.shift(t, a * b), rtol=0, atol=1e-12)
    assert torch.equal(flow.shift(t, 1.0), t)
    assert torch.equal(flow.shift(t, 3.0)[[0, -1]], t[[0, -1]])
    torch.testing.assert_close(flow.shift(1 - t.flip(0), 3.0), torch.tensor(flow_times(100, 3.0)[::-1], dtype=t.dtype))
    with pytest.raises(InputError, match="shift: expected more than 0, got 0"):
        flow.shift(t, 0)


def test_tokens_decide_the_shift_and_a_chunk_gets_the_one_it_is_sampled_with() -> None:
    whole = Bucket(CFG.chunk.latents, people=1)
    assert flow.token_shift(whole.tokens(CFG), CFG) == pytest.approx(CFG.sampling.shift)
    quarter = Bucket(CFG.chunk.latents, people=1, down=2)
    assert flow.token_shift(quarter.tokens(CFG), CFG) == pytest.approx(CFG.sampling.shift / 2)


def test_times_are_logit_normal() -> None:
    t = flow.logit_normal(40_000, torch.Generator().manual_seed(2), mean=0.4, std=0.8)
    u = torch.logit(t.double())
    assert float(u.mean()) == pytest.approx(0.4, abs=0.02) and float(u.std()) == pytest.approx(0.8, abs=0.02)


# ---- guidance --------------------------------------------------------------------------------------------------


def test_guidance_of_ones_is_the_conditioned_pass_and_weights_nest() -> None:
    ones = SamplingConfig(reference_scale=1.0, audio_scale=1.0, text_scale=1.0)
    for has_text in (False, True):
        (only,) = guidance_passes(ones, has_text)
        assert (only.weight, only.reference, only.audio, only.text) == (1, True, True, has_text)
    v0, vr, vra, vrat = torch.randn(4, 6, dtype=torch.float64)
    of = {(False, False, False): v0, (True, False, False): vr, (True, True, False): vra, (True, True, True): vrat}
    r, a, t = 3.0, 2.5, 1.5
    passes = guidance_passes(SamplingConfig(reference_scale=r, audio_scale=a, text_scale=t), True)
    summed = sum(p.weight * of[p.reference, p.audio, p.text] for p in passes)
    torch.testing.assert_close(summed, v0 + r * (vr - v0) + a * (vra - vr) + t * (vrat - vra))


@torch.no_grad()
def test_a_chunk_under_guidance_of_ones_is_plain_euler_on_the_conditioned_model() -> None:
    d, (h, w) = CFG.dit, CFG.latent_size
    dit = _personality().module["dit"].eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    sampling = replace(CFG.sampling, reference_scale=1.0, audio_scale=1.0, text_scale=1.0)
    schedule = make_schedule(sampling, CFG.chunk, 7, has_text=False)
    plan, empty = schedule.plan(0), torch.zeros(1, d.text_len, d.text_dim)
    ref = torch.randn(1, d.in_channels, 2, h, w), empty, torch.randn(1, 8, d.audio_dim), torch.randn(1, 2, d.motion_dim)
    cache = ReferenceCache(*dit.encode_reference(*ref))
    place = Scene(torch.randn(1, d.latent_channels, 1, h, w), torch.ones(1, 1, 1, h, w))
    given = Conditions(place, torch.randn(1, 4 * plan.latents - 3, d.audio_dim), empty, empty)
    done = denoise_chunk(dit, CFG, schedule, plan, ChunkState(), lambda: cache, given)
    assert done is not None
    z = schedule.noise(plan, 0, (d.latent_channels, h, w)).transpose(0, 1)[None]
    m = schedule.noise(plan, 1, (d.motion_dim,))[None]
    for t, t_next in pairwise(schedule.times):
        v, vm = dit(
            with_masks(z, d, 0, 0), torch.full((1, plan.latents), t), empty, given.audio, ref_k=cache.k, ref_v=cache.v,
            anchor=with_masks(place.latent, d, 1, 0), anchor_t=torch.zeros(1), motion=m,
        )  # fmt: skip
        z, m = z + (t_next - t) * v, m + (t_next - t) * vm
    torch.testing.assert_close(done[0].latents, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done[0].motion, m, rtol=1e-4, atol=1e-4)


# ---- the reference and the loss ----------------------------------------------------------------------------------


def _personality() -> PersonalityMethod:
    quiet = {"drop_text": 0.0, "drop_audio": 0.0, "drop_all": 0.0, "drop_reference": 0.0, "drop_motion": 0.0}
    return build(PersonalityMethod, PersonalitySettings(buckets=ONE, shuffle_motion=0.0, **quiet))


def test_reference_rows_never_enter_the_loss() -> None:
    """The head never predicts a reference row, its order among frames apart, and the target holds none of it."""
    method = _personality()
    g = torch.Generator().manual_seed(0)
    b = method.draw(method.table.train, g, ONE[0], "free")
    t = torch.full((len(b.x),), 0.5)
    seen: list[int] = []
    hook = method.module["dit"].head.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    method.loss(b, t, torch.Generator().manual_seed(1), step=0)
    hook.remove()
    assert seen == [b.x.shape[2] * CFG.tokens_per_frame]  # of the generated windows alone
    # A model that ignores the reference (no keys, no values) has a loss that no reference can change.
    dit = method.module["dit"]
    encode = dit.encode_reference
    dit.encode_reference = lambda *a, **k: tuple(kv[:, :, :0] for kv in encode(*a, **k))  # type: ignore[method-assign]
    plain = method.loss(b, t, torch.Generator().manual_seed(1), step=0)["loss"]
    other = b.rolled("ref_latents", "ref_audio", "ref_motion")
    assert torch.equal(plain, method.loss(other, t, torch.Generator().manual_seed(1), step=0)["loss"])


def test_reference_reaches_the_loss_only_through_attention() -> None:
    """Reference latents get a gradient (they are seen) that vanishes with the keys and values they are seen by."""
    method = _personality()
    b = method.draw(method.table.train, torch.Generator().manual_seed(0), ONE[0], "free")
    b.ref_latents.requires_grad_()
    t = torch.full((len(b.x),), 0.5)
    method.loss(b, t, torch.Generator().manual_seed(1), step=0)["loss"].backward()
    assert float(b.ref_latents.grad.abs().sum()) > 0
    dit, b.ref_latents.grad = method.module["dit"], None
    encode = dit.encode_reference
    dit.encode_reference = lambda *a, **k: tuple(kv.detach() for kv in encode(*a, **k))  # type: ignore[method-assign]
    method.loss(b, t, torch.Generator().manual_seed(1), step=0)["loss"].backward()
    assert b.ref_latents.grad is None


def test_given_latents_are_out_of_the_loss() -> None:
    method = build(T2VMethod, T2VSettings(buckets=ONE, p_i2v=1.0))
    b = method.draw(method.table.train, torch.Generator().manual_seed(0), ONE[0], "free")
    assert b.given[:, 0].all() and not b.given[:, 1:].any()
    error, target = torch.randn(2, *b.x.shape)
    region = torch.ones(len(b.x), *b.x.shape[-2:])
    moved = error.clone()
    moved[:, :, 0] += 100
    assert torch.equal(flow.mean_of(flow.flow_errors(error, target, region), ~b.given),
                       flow.mean_of(flow.flow_errors(moved, target, region), ~b.given))  # fmt: skip
    assert torch.equal(flow.temporal_loss(error, target, region, ~b.given),
                       flow.temporal_loss(moved, target, region, ~b.given))  # fmt: skip


def test_region_weights_have_mean_one_and_a_flat_map_changes_nothing() -> None:
    masks = (torch.rand(3, 2, 4, 4) > 0.5).float()
    assert torch.allclose(flow.region_map(masks, 5.0, 8.0).mean((1, 2)), torch.ones(3))
    v, target = torch.randn(2, 3, 4, 2, 4, 4)
    flat = flow.flow_errors(v, target, flow.region_map(torch.ones(3, 2, 4, 4), 5.0, 8.0))
    torch.testing.assert_close(flat, (v - target).square().mean((1, 3, 4)))


# ---- what a stage adds, silent at first --------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_stage_two_says_what_stage_one_says_bit_for_bit() -> None:
    first = build(T2VMethod, T2VSettings(buckets=ONE), seed=1)
    second = build(A2VMethod, A2VSettings(buckets=ONE), seed=2)
    new = second.adopt(first.module.state_dict(), "stage 1")
    assert new and all(any(part in k for part in ("audio", "norm4", "anchor")) for k in new)
    b = second.draw(second.table.train, torch.Generator().manual_seed(0), ONE[0], "free")
    z, t = torch.randn(2, *b.x.shape)[0], torch.rand(len(b.x), b.x.shape[2])
    text = torch.randn(1, CFG.text.length, CFG.text.dim)
    x = torch.cat([z, torch.zeros_like(z[:, :2])], 1)
    deaf, _ = first.module["dit"](x, t, text)
    for audio in (b.audio, None):
        heard, _ = second.module["dit"](x, t, text, audio)
        assert torch.equal(deaf, heard)
    second.module["dit"].blocks[0].audio_attn.o.weight.add_(0.1)
    assert not torch.equal(deaf, second.module["dit"](x, t, text, b.audio)[0])
