"""The losses on decoded faces: exact gates and warm-ups, what they see, what they reach, and that they are a switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_stages import build, networks

from avatar_rt.errors import InputError
from training.losses.suite import Suite, Term
from training.methods import flow
from training.methods.flow import Bucket
from training.methods.personality import PersonalityMethod, PersonalitySettings

ONE = (Bucket(3, people=2, windows=2),)


def test_terms_rise_linearly_and_gate_exactly() -> None:
    term = Term(0.4, start=10, warmup=20, t_max=0.55)
    assert [term.at(s) for s in (0, 10, 15, 20, 30, 1000)] == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.4])
    assert Term(0.4, warmup=0).at(1) == 0.4
    t = torch.tensor([0.0, 0.54999, 0.55, 0.9])
    assert term.gate(t).tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match=r"expected some of identity, .*, got beauty"):
        Suite({"beauty": term}, networks())


def _suite(**terms: Term) -> tuple[Suite, Any, torch.Tensor, torch.Tensor]:
    """A suite, a batch, its noise and its noisy latents at t = 0.3."""
    method = build(PersonalityMethod, PersonalitySettings(buckets=ONE))
    b = method.draw(method.table.train, torch.Generator().manual_seed(0), Bucket(4, people=3), "free")
    noise = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(1))
    return Suite(terms, networks(), dtype=torch.float32), b, noise, flow.noised(b.x, noise, torch.tensor(0.3))


ALL = {name: Term(1.0, warmup=0) for name in ("identity", "perceptual", "temporal", "motion", "sync")}


def test_the_suite_sees_a_perfect_estimate_as_perfect() -> None:
    """With the true velocity the estimate is the clip itself: what compares with the clip is zero."""
    suite, b, noise, z = _suite(**ALL)
    t = torch.full(b.given.shape, 0.3)
    v = flow.velocity(b.x, noise)
    _, right = suite(100, b, z, v, t, torch.Generator().manual_seed(2))
    _, wrong = suite(100, b, z, v + 0.7 * torch.randn_like(v), t, torch.Generator().manual_seed(2))
    for name in ("perceptual", "temporal"):
        assert float(right[name]) < 1e-6 < 1e-3 < float(wrong[name])
    assert all(float(wrong[name]) != float(right[name]) for name in ALL)


def test_each_loss_reaches_the_velocity_and_its_weight_counts() -> None:
    for name in ALL:
        suite, b, noise, z = _suite(**{name: Term(0.5, warmup=0)})
        v = (flow.velocity(b.x, noise) + 0.3 * noise).requires_grad_()
        total, parts = suite(7, b, z, v, torch.full(b.given.shape, 0.3), torch.Generator().manual_seed(2))
        total.backward()
        assert float(total.detach()) == pytest.approx(0.5 * float(parts[name]), rel=1e-5)
        touched = v.grad.abs().sum((1, 3, 4)) > 0  # [B, T]
        assert int(touched.any(1).sum()) == suite.samples and int(touched.sum()) == suite.samples * suite.latents
        assert not touched[:, 0].any()  # the decoder starts with a true latent


def test_gates_close_one_by_one() -> None:
    terms = {"perceptual": Term(1.0, warmup=0, t_max=0.5), "motion": Term(1.0, warmup=0, t_max=0.7)}
    suite, b, noise, _ = _suite(**terms)
    for level, open_ in ((0.4, {"perceptual", "motion"}), (0.6, {"motion"}), (0.8, set())):
        z = flow.noised(b.x, noise, torch.tensor(level))
        total, parts = suite(5, b, z, noise, torch.full(b.given.shape, level), torch.Generator().manual_seed(0))
        assert {n for n, p in parts.items() if float(p) > 0} == open_
        assert (float(total) > 0) == bool(open_)
    early = Suite({"motion": Term(1.0, start=50, warmup=10)}, networks(), dtype=torch.float32)
    total, parts = early(50, b, b.x, noise, torch.zeros(b.given.shape), torch.Generator().manual_seed(0))
    assert float(total) == 0 and float(parts["motion"]) == 0  # it has not begun: nothing was decoded


def test_windows_too_short_to_decode_are_left_alone() -> None:
    suite = _suite(**ALL)[0]
    rows, _ = suite.choose(torch.full((4, 2), 0.1), torch.zeros(4, 2, dtype=torch.bool), 0.55, torch.Generator())
    assert len(rows) == 0
    given = torch.tensor([[True, True, False, False]] * 4)
    rows, first = suite.choose(torch.full((4, 4), 0.1), given, 0.55, torch.Generator())
    assert len(rows) == 2 and (first == 2).all()  # what was carried over is not the model's to answer for


def test_auxiliary_losses_are_a_switch() -> None:
    plain = build(PersonalityMethod, PersonalitySettings(buckets=ONE))
    usual = {"loss", "flow", "temporal", "motion", "samples", "tokens"}
    assert set(plain.step(0, torch.Generator().manual_seed(0))) == usual
    settings = PersonalitySettings(buckets=ONE, terms=ALL)
    suite = Suite(ALL, networks(), dtype=torch.float32)
    method = build(PersonalityMethod, settings, suite)
    values = method.step(5, torch.Generator().manual_seed(0))
    assert set(values) == usual | {f"aux_{name}" for name in ALL}
    assert all(not p.requires_grad for net in vars(suite.nets).values() for p in net.parameters())
    assert not any(k.startswith(("vae", "identity")) for k in method.module.state_dict())
