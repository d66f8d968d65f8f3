"""VideoRefDiT's invariants: what reference rows may depend on, what generated rows see, and its derived sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from avatar_rt.config import DiTConfig, preset
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.layers import rope_table

SMALL = DiTConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=12, text_len=4, latent_channels=4, mask_channels=2,
    reference=True, anchor=True, anchor_concat=True,
    audio_dim=10, reference_audio_dim=6, audio_adapter_dim=8, motion_dim=16,
)  # fmt: skip


def _model(cfg: DiTConfig = SMALL) -> VideoRefDiT:
    torch.manual_seed(0)
    model = VideoRefDiT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def _inputs(cfg: DiTConfig = SMALL, batch: int = 2, frames: int = 3, ref: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return {
        "latents": rand(batch, 6, frames, 4, 6), "t": rand(batch, frames).sigmoid(), "text": rand(batch, 4, 12),
        "audio": rand(batch, 4 * frames, 10), "anchor": rand(batch, 6, 1, 4, 6), "motion": rand(batch, frames, 16),
        "ref": rand(batch, 6, ref, 4, 6), "ref_audio": rand(batch, 4 * ref, 6), "ref_motion": rand(batch, ref, 16),
    }  # fmt: skip


def _reference(model: VideoRefDiT, x: dict[str, torch.Tensor], **kw) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_reference(x["ref"], torch.zeros(1, 4, 12), x["ref_audio"], x["ref_motion"], **kw)


def _forward(model: VideoRefDiT, x: dict[str, torch.Tensor], k=None, v=None, **kw):
    given = {"anchor": x["anchor"], "motion": x["motion"], "ref_k": k, "ref_v": v} | kw
    return model(x["latents"], x["t"], x["text"], x["audio"], **given)


@pytest.mark.parametrize("pattern", ["full", "frame", "window"])
@torch.no_grad()
def test_reference_is_the_same_whatever_is_generated(pattern: str) -> None:
    """The recomputed K/V of a second request, with another step, speech and scene, are the same bits."""
    model, x = _model(dataclasses.replace(SMALL, reference_pattern=pattern)), _inputs()
    k, v = _reference(model, x)
    for seed in range(2):
        torch.manual_seed(seed)
        y = {key: torch.randn_like(value) if not key.startswith("ref") else value for key, value in x.items()}
        y["t"] = torch.rand_like(x["t"])
        _forward(model, y, k, v)
        again_k, again_v = _reference(model, y)
        assert torch.equal(k, again_k) and torch.equal(v, again_v)


@torch.no_grad()
def test_reference_reaches_every_generated_row() -> None:
    model, x = _model(), _inputs()
    k, v = _reference(model, x)
    with_ref, _ = _forward(model, x, k, v)
    x["ref"] = x["ref"] + 0.1
    changed, _ = _forward(model, x, *_reference(model, x))
    assert ((with_ref - changed).abs().amax((1, 3, 4)) > 0).all()


@torch.no_grad()
def test_patterns_differ_and_frames_stay_apart() -> None:
    """With pattern ``frame``, one reference frame's rows do not depend on another's."""
    model, x = _model(dataclasses.replace(SMALL, reference_pattern="frame")), _inputs()
    k, _ = _reference(model, x)
    x["ref"][:, :, 1] += 1.0
    x["ref_audio"][:, 4:] += 1.0
    x["ref_motion"][:, 1] += 1.0
    other, _ = _reference(model, x)
    rows = k.shape[2] // 2
    assert torch.equal(k[:, :, :rows], other[:, :, :rows])
    assert not torch.equal(k[:, :, rows:], other[:, :, rows:])


@torch.no_grad()
def test_dropped_rows_are_unseen() -> None:
    """Dropped reference and anchor patches may hold anything."""
    model, x = _model(), _inputs()
    rows = torch.tensor([0, 2, 3, 6, 8, 11])
    anchor_rows = torch.tensor([1, 4])
    k, v = _reference(model, x, rows=rows)
    assert k.shape[2] == len(rows) + 2  # two motion tokens
    out, _ = _forward(model, x, k, v, anchor_rows=anchor_rows)
    keep = torch.zeros(2 * 6, dtype=torch.bool)
    keep[rows] = True
    mask = keep.view(2, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x["ref"] = torch.where(mask, x["ref"], torch.full_like(x["ref"], 7.0))
    keep = torch.zeros(6, dtype=torch.bool)
    keep[anchor_rows] = True
    mask = keep.view(1, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x["anchor"] = torch.where(mask, x["anchor"], torch.full_like(x["anchor"], 7.0))
    same, _ = _forward(model, x, *_reference(model, x, rows=rows), anchor_rows=anchor_rows)
    assert torch.equal(out, same)


@torch.no_grad()
def test_speech_reaches_its_own_window_first() -> None:
    """One block: a latent frame hears its own, the previous and the next latent's features, and no other's."""
    cfg = dataclasses.replace(SMALL, num_layers=1, motion_dim=0)
    model, x = _model(cfg), _inputs(frames=6)
    x["motion"] = None
    out, _ = _forward(model, x)
    x["audio"][:, 4 * 3 : 4 * 4] += 1.0
    changed, _ = _forward(model, x)
    moved = (out - changed).abs().amax((0, 1, 3, 4)) > 0
    assert moved.tolist() == [False, False, True, True, True, False]


@torch.no_grad()
def test_motion_is_injected_in_its_own_frame() -> None:
    model, x = _model(), _inputs()
    _, velocity = _forward(model, x)
    assert velocity.shape == x["motion"].shape
    x["motion"] = x["motion"].clone()
    x["motion"][:, 1] += 1.0
    assert not torch.equal(velocity, _forward(model, x)[1])


def test_a_wrong_shape_says_what_was_expected() -> None:
    model, x = _model(), _inputs()
    with pytest.raises(InputError, match=r"latents: expected \[B, 6, T, H, W\], got \[2, 5, 3, 4, 6\]"):
        model(x["latents"][:, :5], x["t"], x["text"], x["audio"])
    with pytest.raises(InputError, match=r"t: expected \[2\] or \[2, 3\], got \[2, 2\]"):
        model(x["latents"], x["t"][:, :2], x["text"], x["audio"])
    with pytest.raises(InputError, match=r"audio: expected \[B, 12 or 9, 10\] for 3 latent frames, got \[2, 11, 10\]"):
        model(x["latents"], x["t"], x["text"], x["audio"][:, :11])
    off = _model(dataclasses.replace(SMALL, reference=False, anchor=False, anchor_concat=False))
    with pytest.raises(InputError, match="anchor: expected none"):
        off(x["latents"], x["t"], x["text"], x["audio"], anchor=x["anchor"])
    with pytest.raises(InputError, match="reference=True"):
        off.encode_reference(x["ref"], x["text"])


def test_rope_is_relative() -> None:
    """The product of a rotated query and key depends on the difference of their positions only."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 24).double().view(2, 12, 2).unbind(0)
    q, k = torch.view_as_complex(q.contiguous()), torch.view_as_complex(k.contiguous())

    def score(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        cos, sin = rope_table(torch.tensor([a, b]), (8, 8, 8), 10_000.0)
        turn = torch.complex(cos.double(), sin.double())
        return float(((q * turn[0]) * (k * turn[1]).conj()).sum().real)

    assert score((3, 1, 2), (1, 0, 5)) == pytest.approx(score((13, 6, 9), (11, 5, 12)), abs=1e-5)


def test_masks_follow_the_latents() -> None:
    z = torch.zeros(1, 4, 2, 3, 3)
    out = with_masks(z, SMALL, 1, torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1))
    assert out.shape == (1, 6, 2, 3, 3)
    assert out[0, 4].eq(1).all() and out[0, 5, 0].eq(0).all() and out[0, 5, 1].eq(1).all()
    assert with_masks(z, dataclasses.replace(SMALL, mask_channels=0), 1, 0) is z


@pytest.mark.parametrize("name", ["tiny", "wan_1_3b", "tavr_14b"])
def test_presets_build_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = VideoRefDiT(preset(name).dit)
    assert all(p.is_meta for p in model.parameters())


def test_gradients_reach_every_parameter() -> None:
    model, x = _model(), _inputs()
    out, motion = _forward(model, x, *_reference(model, x))
    (out.square().mean() + motion.square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    unused = {"null_audio", "null_reference_audio"}  # only without speech
    assert {n for n in silent if not n.startswith("blocks.2.")} <= unused
