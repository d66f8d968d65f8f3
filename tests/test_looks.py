"""The identity network of the losses, what the VAE makes of it, and the preconditioned head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avatar_rt.config import DiTConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import velocity_of
from training.methods.identity import IdentityMethod
from training.methods.vae import SHRUNK, boxes_of, look_loss, shrink
from training.rewards.identity import SIZE, IdentityNet, crop_faces, perceptual_distance


class People:
    """A corpus of flat faces: one colour a person, another brightness in each of the two takes."""

    num_frames = 5

    def __init__(self, people: int) -> None:
        self.identity = np.repeat(np.arange(people), 2)
        rng = np.random.default_rng(3)
        self.colour = rng.uniform(60, 190, (people, 3))

    def __len__(self) -> int:
        return len(self.identity)

    def siblings(self, i: int) -> list[int]:
        return [i ^ 1]

    def frames(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        colour = self.colour[self.identity[i]] * (0.9 + 0.2 * (i % 2))
        return np.broadcast_to(colour.astype(np.uint8), (n or self.num_frames, 32, 32, 3)).copy()

    def facebox(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        return np.tile(np.array([8, 8, 24, 24], np.float32), (n or self.num_frames, 1))


def test_velocity_of_a_perfect_head() -> None:
    """What the head would have to say, (x - skip z) / scale, comes out as the velocity noise - x at every t."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 400, 8, dtype=torch.float64)
    for t in (0.0, 0.3, 0.7, 1.0):
        t = torch.tensor(t, dtype=torch.float64)
        z = (1 - t) * x + t * noise
        spread2 = (1 - t) ** 2 + t**2
        # x = skip z + scale F with skip = (1 - t) / spread2 and scale = t / sqrt(spread2); at t = 0, F = -noise.
        head = (x - (1 - t) / spread2 * z) * spread2.sqrt() / t if t else -noise
        assert float(head.square().mean()) == pytest.approx(1, abs=0.1)
        torch.testing.assert_close(velocity_of(head, z, t).double(), noise - x, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="prediction: expected velocity or preconditioned"):
        DiTConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1, prediction="noise")


def test_crops_follow_the_box() -> None:
    frames = torch.zeros(1, 3, 64, 64)
    frames[:, :, 20:40, 10:30] = 1
    crop = crop_faces(frames, torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
    inside = round(SIZE / 1.25)
    assert crop.shape == (1, 3, SIZE, SIZE)
    assert crop.mean() == pytest.approx((inside / SIZE) ** 2, abs=0.03)
    edge = (SIZE - inside) // 2
    assert crop[..., edge + 3 : -edge - 3, edge + 3 : -edge - 3].min() > 0.9 and crop[..., : edge - 3, :].max() < 0.1


def test_boxes_of_masks() -> None:
    mask = torch.zeros(2, 40, 50, dtype=torch.bool)
    mask[0, 5:20, 10:45] = True
    boxes, seen = boxes_of(mask)
    assert boxes[0].tolist() == [10, 5, 45, 20] and seen.tolist() == [True, False]


def test_distance_is_zero_for_the_same_and_grows() -> None:
    torch.manual_seed(1)
    net, faces = IdentityNet(), torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    assert float(perceptual_distance(net, faces, faces)) == pytest.approx(0, abs=1e-6)
    near, far = (perceptual_distance(net, faces + s * torch.randn(faces.shape), faces) for s in (0.05, 0.5))
    assert 0 < float(near) < float(far)


def test_look_loss_reaches_the_decoder_and_skips_what_has_no_face() -> None:
    torch.manual_seed(2)
    net = IdentityNet().requires_grad_(False)
    video, weight = torch.rand(1, 3, 8, 48, 48), torch.ones(1, 1, 8, 48, 48)
    out = (video + 0.1 * torch.randn(video.shape)).requires_grad_()
    g = torch.Generator().manual_seed(0)
    assert float(look_loss(net, out, video, weight, g)) == 0
    weight[..., 10:30, 12:34] = 2.5
    look_loss(net, out, video, weight, g).backward()
    touched = out.grad.abs().sum((0, 1, 3, 4)) > 0
    assert int(touched.sum()) == 2  # every fourth frame of eight
    assert out.grad[..., :2, :].abs().sum() == 0  # far from the face


def test_identity_network_learns_people_it_has_not_seen(tmp_path) -> None:
    torch.manual_seed(0)
    method = IdentityMethod(People(40), People(12), people=16)
    optimiser, g = torch.optim.AdamW(method.module.parameters(), 2e-3), torch.Generator().manual_seed(0)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        values = method.step(step, g)
        values["loss"].backward()
        optimiser.step()
        losses.append(float(values["loss"].detach()))
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    assert method.validate(0, tmp_path)["clips"] == 24


def test_shrunk_videos_keep_their_frames_and_their_level() -> None:
    """Latents and pixels are shrunk alike: 8 pixels stay one latent, and nothing aliases."""
    video, latents = torch.rand(2, 3, 5, 64, 64), torch.rand(2, 4, 2, 8, 8)
    video[:, 2] = (torch.arange(64) % 2).float()
    for by in SHRUNK:
        small, z = shrink(by, video, latents)
        assert small.shape == (2, 3, 5, 64 * by, 64 * by) and z.shape == (2, 4, 2, 8 * by, 8 * by)
        torch.testing.assert_close(small.mean((3, 4)), video.mean((3, 4)), atol=0.02, rtol=0)
        assert float(small[:, 2, :, 4:-4, 4:-4].std()) < 0.3  # of 0.5
    assert torch.equal(shrink(0.5, video)[0][0, :, 3], shrink(0.5, video[:, :, 3:4])[0][0, :, 0])
