"""All guidance passes as one batch: the guided sum of the modules' own passes, whatever a pass goes without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import typical
from torch import Tensor

from avatar_rt.config import ChunkConfig, DiTConfig, SamplingConfig
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.guided import GuidedDiT, refuses_guided
from avatar_rt.ops.program import refuses_program
from avatar_rt.pipeline.denoise import Conditions, Scene, _guidance
from avatar_rt.pipeline.reference import ReferenceCache, pack_cache
from avatar_rt.pipeline.schedule import Schedule, guidance_passes, make_schedule

SMALL = DiTConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=3, text_dim=12, text_len=4, latent_channels=4, mask_channels=2,
    reference=True, anchor=True, anchor_concat=True,
    audio_dim=10, reference_audio_dim=6, audio_adapter_dim=8, motion_dim=16,
)  # fmt: skip
REASON = refuses_program(torch.device("cpu"), torch.bfloat16)
needs_kernels = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def _models(**changes: Any) -> tuple[VideoRefDiT, VideoRefDiT]:
    """The same random weights (rounded to bf16) in bf16 and in fp64's stand-in, fp32."""
    import dataclasses

    torch.manual_seed(0)
    exact = VideoRefDiT(dataclasses.replace(SMALL, **changes)).eval().requires_grad_(False)
    for p in exact.parameters():
        torch.nn.init.normal_(p, std=0.1)
        p.copy_(p.bfloat16())
    coarse = VideoRefDiT(exact.cfg).eval().requires_grad_(False)
    coarse.load_state_dict(exact.state_dict())
    return coarse.bfloat16(), exact


class Case:
    """One chunk's inputs; ``velocity(dit)`` is its guided velocity as the pipeline computes it."""

    def __init__(self, cfg: DiTConfig, frames: int = 4, prompt: bool = False, **scales: float) -> None:
        g = torch.Generator().manual_seed(1)
        self.cfg, self.frames = cfg, frames
        self.latents = torch.randn(1, 6, frames, 4, 6, generator=g)
        self.motion = torch.randn(1, frames, 16, generator=g) if cfg.motion_dim else None
        self.t = torch.full((1, frames), 0.6)
        self.t[:, :1] = 0
        self.resting = None if self.motion is None else self.motion.flip(2)
        self.anchor = torch.randn(1, 6, 1, 4, 6, generator=g)
        self.ref = torch.randn(1, 6, 2, 4, 6, generator=g)
        self.ref_motion = torch.randn(1, 2, 16, generator=g) if cfg.motion_dim else None
        empty = torch.zeros(1, 4, 12)
        text = torch.randn(1, 4, 12, generator=g) if prompt else empty
        audio = torch.randn(1, 4 * frames, 10, generator=g)
        self.given = Conditions(Scene(self.anchor, self.anchor), audio, text, empty)
        defaults = {"reference_scale": 3.0, "audio_scale": 2.5, "text_scale": 1.5}
        sampling = SamplingConfig(steps=2, **(defaults | scales))
        self.schedule: Schedule = make_schedule(sampling, ChunkConfig(frames, 1), 0, has_text=prompt)

    def cache(self, dit: VideoRefDiT, packed: bool) -> ReferenceCache:
        k, v = dit.encode_reference(self.ref, self.given.empty_text, None, self.ref_motion)
        cache = ReferenceCache(k, v)
        return pack_cache(cache) if packed else cache

    def velocity(self, dit: Any, *, packed: bool = False, steps: int = 1) -> tuple[Tensor, Tensor | None]:
        module = getattr(dit, "dit", dit)
        kept = self.cache(module, packed)
        reference = (lambda: kept) if packed else (lambda: self.cache(module, False))
        call = _guidance(dit, self.schedule, self.schedule.passes, self.anchor, self.frames, reference, self.given)
        for _ in range(steps):
            result = call(self.latents, self.t, self.motion, self.resting)
        return result


def _check(case: Case, coarse: VideoRefDiT, exact: VideoRefDiT) -> None:
    truth, plain, got = case.velocity(exact), case.velocity(coarse), case.velocity(GuidedDiT(coarse))
    for t, p, g in zip(truth, plain, got, strict=True):
        if t is None:
            assert g is None
            continue
        assert g.shape == t.shape and g.dtype == torch.float32
        assert typical(g, t.double()) <= 2 * typical(p, t.double())


@needs_kernels
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("motion_scale", [0.0, 0.7])
@torch.no_grad()
def test_is_the_sum_of_the_passes(prompt: bool, motion_scale: float) -> None:
    coarse, exact = _models()
    _check(Case(SMALL, prompt=prompt, motion_scale=motion_scale), coarse, exact)


@needs_kernels
@pytest.mark.parametrize("changes", [{"prediction": "preconditioned"}, {"motion_dim": 0}])
@torch.no_grad()
def test_other_models(changes: dict[str, Any]) -> None:
    coarse, exact = _models(**changes)
    _check(Case(coarse.cfg), coarse, exact)


@needs_kernels
@pytest.mark.parametrize("frames", [1, 2, 3])
@torch.no_grad()
def test_short_chunks(frames: int) -> None:
    """With one and two latents, every frame is at an end, where silence is not a constant."""
    coarse, exact = _models()
    _check(Case(SMALL, frames=frames), coarse, exact)


@needs_kernels
@torch.no_grad()
def test_cache_on_and_off_and_again_are_bit_equal() -> None:
    coarse, _ = _models()
    case, guided = Case(SMALL), GuidedDiT(coarse)
    off, on, again = case.velocity(guided), case.velocity(guided, packed=True), case.velocity(guided, steps=2)
    for a, b, c in zip(off, on, again, strict=True):
        assert a is not None and torch.equal(a, b) and torch.equal(a, c)


@needs_kernels
@torch.no_grad()
def test_calling_it_is_calling_the_model() -> None:
    coarse, _ = _models()
    case, guided = Case(SMALL), GuidedDiT(coarse)
    args = (case.latents, case.t, case.given.text, case.given.audio)
    for a, b in zip(guided(*args, motion=case.motion), coarse(*args, motion=case.motion), strict=True):
        assert torch.equal(a, b)
    assert guided.encode_reference == coarse.encode_reference and guided.cfg is coarse.cfg


def test_heads_that_do_not_fill_registers_are_refused() -> None:
    model = VideoRefDiT(DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=12, text_len=4))
    assert refuses_guided(model.bfloat16()) == "head size 24 is not a multiple of 16"


def test_weights_sum_to_one_with_inner_guidance() -> None:
    for scales in ((1, 1, 1, 0), (3, 2.5, 1, 0), (3, 2.5, 1.5, 0.8), (0, 1, 2, -0.5), (2, 2, 2, 0.3)):
        r, a, t, m = scales
        sampling = SamplingConfig(reference_scale=r, audio_scale=a, text_scale=t, motion_scale=m)
        for has_text in (False, True):
            passes = guidance_passes(sampling, has_text)
            assert sum(p.weight for p in passes) == pytest.approx(1)
            assert sum(p.motion_weight for p in passes) == pytest.approx(1)
            assert all(p.motion_weight == 0 for p in passes if p.resting)
            assert any(p.resting for p in passes) == (m != 0)
    off = guidance_passes(SamplingConfig(reference_scale=3, audio_scale=2.5), False)
    assert [(p.weight, p.reference, p.audio, p.text) for p in off] == [
        (-2, False, False, False), (0.5, True, False, False), (2.5, True, True, False),
    ]  # fmt: skip


@torch.no_grad()
def test_inner_guidance_moves_away_from_a_silent_mouth_at_rest() -> None:
    """v + w (v - v of silence), and the motion's own velocity untouched; in fp32, by modules."""
    _, exact = _models()
    scales = {"reference_scale": 1.0, "audio_scale": 1.0}
    plain, guided = Case(SMALL, **scales), Case(SMALL, motion_scale=0.5, **scales)
    v, vm = plain.velocity(exact)
    got, got_motion = guided.velocity(exact)
    cache = plain.cache(exact, False)
    bare, _ = exact(
        plain.latents, plain.t, plain.given.text, None, anchor=plain.anchor, anchor_t=torch.zeros(1),
        motion=plain.resting, ref_k=cache.k, ref_v=cache.v,
    )  # fmt: skip
    torch.testing.assert_close(got, v + 0.5 * (v - bare))
    assert vm is not None and torch.equal(got_motion, vm)
    assert (bare - v).abs().max() > 1e-3
