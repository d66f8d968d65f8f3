"""Motion space and encoder: names, grouping by latent frame, statistics, errors."""

import numpy as np
import pytest
import torch

from avatar_rt.config import MOTION_CHANNELS, MotionConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import (
    ARKIT_NAMES,
    MOTION_NAMES,
    MotionEncoder,
    group_motion,
    mirror_motion,
    motion_index,
    rest_tokens,
    ungroup_motion,
)


@pytest.fixture(scope="module")
def encoder() -> MotionEncoder:
    torch.manual_seed(0)
    encoder = MotionEncoder(MotionConfig(base_dim=8)).eval().requires_grad_(False)
    encoder.mean.uniform_(-0.1, 0.5)
    encoder.std.uniform_(0.02, 0.3)
    return encoder


def test_names():
    assert len(ARKIT_NAMES) == 52 and list(ARKIT_NAMES) == sorted(ARKIT_NAMES)
    assert len(set(MOTION_NAMES)) == MOTION_CHANNELS
    assert motion_index("jawOpen") == 24 and motion_index("yaw") == 52
    with pytest.raises(InputError, match="got 'jawopen'"):
        motion_index("jawopen")


@pytest.mark.parametrize("frames, latents", [(1, 1), (5, 2), (37, 10)])
def test_grouping_goes_round(frames, latents):
    motion = torch.randn(2, frames, 62)
    tokens = group_motion(motion)
    assert tokens.shape == (2, latents, 248)
    assert torch.equal(ungroup_motion(tokens), motion)
    assert torch.equal(tokens[:, 0].view(2, 4, 62), motion[:, :1].expand(2, 4, 62))


def test_latent_k_holds_frames_4k_minus_3_to_4k():
    motion = torch.arange(13.0)[None, :, None].expand(1, 13, 62)
    assert group_motion(motion)[0, 2].view(4, 62)[:, 0].tolist() == [5.0, 6.0, 7.0, 8.0]


def test_first_frame_is_the_mean_of_its_copies():
    tokens = torch.zeros(1, 1, 8)
    tokens[0, 0, ::2] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert ungroup_motion(tokens).tolist() == [[[3.0, 0.0]]]


@pytest.mark.parametrize("frames", [0, 2, 4, 8])
def test_grouping_refuses_other_lengths(frames):
    with pytest.raises(InputError, match=rf"expected 1 \+ 4k frames, got {frames}"):
        group_motion(torch.zeros(1, frames, 62))


def test_ungrouping_refuses_other_widths():
    with pytest.raises(InputError, match=r"got \[1, 3, 62\]"):
        ungroup_motion(torch.zeros(1, 3, 62))


def test_mirror():
    motion = torch.randn(3, 62)
    mirrored = mirror_motion(motion)
    assert torch.equal(mirror_motion(mirrored), motion)
    assert torch.equal(mirrored[:, motion_index("eyeBlinkLeft")], motion[:, motion_index("eyeBlinkRight")])
    assert torch.equal(mirrored[:, motion_index("gazeLeftX")], -motion[:, motion_index("gazeRightX")])
    for name, sign in (("jawOpen", 1), ("yaw", -1), ("pitch", 1), ("roll", -1), ("translateX", -1), ("translateY", 1)):
        assert torch.equal(mirrored[:, motion_index(name)], sign * motion[:, motion_index(name)])


def test_statistics(encoder):
    motion = torch.randn(2, 5, 62)
    assert torch.allclose(encoder.denormalize(encoder.normalize(motion)), motion, atol=1e-6)
    frames = torch.rand(3, 3, 64, 64) * 2 - 1
    assert torch.allclose(encoder.normalize(encoder(frames)), encoder.read(frames), atol=1e-4)


def test_reads_each_frame_alone(encoder):
    frames = torch.rand(3, 3, 64, 64) * 2 - 1
    motion = encoder(frames)
    assert motion.shape == (3, 62) and motion.dtype == torch.float32
    assert torch.allclose(encoder(frames[1:2])[0], motion[1], atol=1e-5)


def test_half_precision_weights(encoder):
    half = MotionEncoder(encoder.cfg).to(torch.bfloat16)
    assert half(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


def test_size_of_the_shipped_encoder():
    assert sum(p.numel() for p in MotionEncoder(MotionConfig()).parameters()) * 2 <= 1_300_000


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 64, 32), (1, 1, 64, 64)])
def test_bad_frames(encoder, shape):
    with pytest.raises(InputError, match=r"frames: expected \[B, 3, 64, 64\]"):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("cfg", [MotionConfig(size=40), MotionConfig(base_dim=12)])
def test_bad_sizes(cfg):
    with pytest.raises(InputError, match="expected a multiple of"):
        MotionEncoder(cfg)


def test_moved_pictures_carry_their_shift_and_zoom():
    from training.methods.augment import move_pictures

    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spot = torch.exp(-0.5 * ((x - 41.5) ** 2 + (y - 25.5) ** 2) / 4)  # 10 right of and 6 above the centre
    moved, shift, zoom = move_pictures(spot.expand(6, 3, 64, 64), torch.Generator().manual_seed(0))
    mass = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    centre = torch.stack(((mass * x).sum((1, 2)), (mass * y).sum((1, 2))), 1) - 31.5
    expected = torch.tensor([10.0, -6.0]) * zoom[:, None] + shift * 64
    assert torch.allclose(centre, expected, atol=0.1)


class _Clips:
    """Three clips of noise with labels, as a corpus gives them."""

    def __len__(self) -> int:
        return 3

    def frames(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(clip).integers(0, 255, (count, 64, 64, 3)).astype(np.uint8)

    def motion(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(clip).random((count, 62)).astype(np.float32)


def test_training_step_and_export(tmp_path):
    from safetensors.torch import load_file

    from training.methods.encoders import MotionMethod

    method = MotionMethod(MotionConfig(base_dim=8), _Clips(), _Clips(), batch=4)
    losses = [method.step(0, torch.Generator().manual_seed(5))["loss"] for _ in range(2)]
    assert losses[0].isfinite() and torch.equal(losses[0], losses[1])
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.module.parameters())
    with torch.no_grad():
        assert -1 <= method.validate(0, tmp_path)["r_jawOpen"] <= 1
    method.export(tmp_path)
    state = load_file(tmp_path / "motion.safetensors")
    assert state["out.weight"].dtype == torch.bfloat16 and state["std"].dtype == torch.float32
    MotionEncoder(method.module.cfg).load_state_dict(state)


def test_a_mouth_at_rest_is_the_mean_under_the_same_noise() -> None:
    clean, noise, t = torch.randn(1, 3, 248), torch.randn(1, 3, 248), torch.tensor([[0.0, 0.4, 1.0]])
    at = t[:, :, None]
    rest = rest_tokens((1 - at) * clean + at * noise, clean, t).unflatten(2, (4, 62))
    expected = clean.unflatten(2, (4, 62)).clone()
    mouth = [i for i, name in enumerate(MOTION_NAMES) if name.startswith(("jaw", "mouth", "tongue"))]
    assert len(mouth) == 28
    expected[..., mouth] = 0
    torch.testing.assert_close(rest, (1 - at[..., None]) * expected + at[..., None] * noise.unflatten(2, (4, 62)))
    other = torch.randn(1, 3, 16)
    torch.testing.assert_close(rest_tokens(0.6 * other, other, torch.full((1, 3), 0.4)), torch.zeros(1, 3, 16))
