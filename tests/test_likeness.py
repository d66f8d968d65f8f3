"""The reference's person in the solver's estimate: where, when, whose, in which place, and nothing else."""

from __future__ import annotations

import dataclasses
from itertools import pairwise, product

import numpy as np
import pytest
import small_bundle
import torch

from avatar_rt import AvatarEngine
from avatar_rt.config import SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, motion_index, mouth_channels
from avatar_rt.pipeline.denoise import solve
from avatar_rt.pipeline.likeness import JAW, JOIN, LATE, LEAVE, LIPS, MOVES, Likeness, guide_masks, moves_of, slopes_of
from avatar_rt.pipeline.reference import to_video
from avatar_rt.prepared import Reference
from avatar_rt.scene.image import blank_head
from avatar_rt.scene.matte import place_person

MASK = torch.zeros(1, 1, 1, 4, 4)
MASK[..., 1:3, 1:3] = 1
UPPER = MASK.clone()
UPPER[..., 2:, :] = 0


def _likeness(times: tuple[float, ...] = (0.8,), motion: bool = True) -> Likeness:
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 3, 5, 4, 4, generator=g)
    told = 10 * torch.randn(1, 5, 6, generator=g) if motion else None  # far apart, next to what leaving costs
    return Likeness(times, latents, told, MASK, UPPER, moves_of(latents, MASK)[:2])


def _estimates(lent: Likeness, t_next: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents before and after the guide, in one step from 0.9, and the guide's."""
    z, v = (torch.randn(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    out, _ = lent.step(z, v, 0.9, t_next, lent.motion[:, [4, 1]] + 0.01)
    return z - 0.9 * v, (out - t_next * (z + 0.1 * v)) / (1 - t_next), lent.latents[:, :, [4, 1]]


def test_the_face_is_the_references_and_the_rest_moves_as_the_models() -> None:
    before, after, guide = _estimates(_likeness(), 0.7)
    inside = MASK.bool().expand_as(guide)
    assert torch.allclose(after[inside], guide[inside], atol=1e-5)
    moves = [(x - x.mean(2, keepdim=True))[~inside] for x in (before, after)]
    assert torch.allclose(*moves, atol=1e-5)


def test_what_is_left_out_looks_like_the_guide_but_for_how_its_mouth_moves() -> None:
    lent = _likeness()
    before, after, guide = (x.mean(2, keepdim=True) for x in _estimates(lent, 0.7))
    outside = ~MASK.bool()
    missing = (guide - before) * outside
    left = (guide - after) * outside
    along = lent.moves @ missing.flatten()
    assert float(along.norm()) > 0.1 and torch.allclose(left.flatten(), lent.moves.T @ along, atol=1e-5)
    unmoved = dataclasses.replace(lent, moves=lent.moves[:0])
    assert torch.allclose(_estimates(unmoved, 0.7)[1].mean(2, keepdim=True), guide, atol=1e-5)


def test_moves_are_what_changes_in_the_mouth_and_nowhere_else() -> None:
    g = torch.Generator().manual_seed(1)
    still, change = torch.randn(3, 1, 4, 4, generator=g), torch.randn(3, 1, 4, 4, generator=g)
    latents = (still + torch.randn(6, generator=g).view(1, 6, 1, 1) * change)[None]
    (found,) = moves_of(latents, MASK)
    wanted = (change[None] * (1 - MASK)).flatten()
    assert torch.allclose(found * torch.dot(found, wanted).sign(), wanted / wanted.norm(), atol=1e-4)
    assert len(moves_of(still[None], MASK)) == len(moves_of(still[None].expand(-1, -1, 5, -1, -1), MASK)) == 0
    many = moves_of(torch.randn(1, 3, 9, 4, 4, generator=g), MASK)
    assert len(many) == MOVES and torch.allclose(many @ many.T, torch.eye(MOVES), atol=1e-4)


def test_late_steps_take_the_upper_part_alone() -> None:
    lent = _likeness()
    _, early, guide = _estimates(lent, LATE)
    before, late, _ = _estimates(lent, LATE - 0.05)
    assert torch.allclose(early[..., 1:3, 1:3], guide[..., 1:3, 1:3], atol=1e-5)
    assert torch.allclose(late[..., 1, 1:3], guide[..., 1, 1:3], atol=1e-5)
    moves = [(x - x.mean(2, keepdim=True))[..., 2, 1:3] for x in (before, late)]
    assert torch.allclose(*moves, atol=1e-5)


def _tokens(*frames: dict[str, float]) -> torch.Tensor:
    """Motion [1, T, M] of latents in whose frames these channels have these values, and the others none."""
    out = torch.zeros(1, len(frames), FRAMES_PER_LATENT, len(MOTION_NAMES))
    for i, channels in enumerate(frames):
        for name, value in channels.items():
            out[0, i, :, motion_index(name)] = value
    return out.flatten(2)


def _led_by(motion: torch.Tensor, **more: torch.Tensor) -> Likeness:
    latents = torch.randn(1, 3, motion.shape[1], 4, 4, generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(_likeness(), latents=latents, motion=motion, **more)


def test_the_jaw_counts_more_than_the_lips_and_the_rest_nothing() -> None:
    lent = _led_by(_tokens({"jawOpen": 0.5}, {"mouthSmileLeft": 2.0, "yaw": 9.0}))
    assert lent.follow(_tokens({})).tolist() == [1]


def test_the_reference_goes_on_as_it_does_unless_the_jaw_is_worth_leaving_it() -> None:
    lent = _led_by(_tokens(*({"jawOpen": x} for x in (0, 1, 0, 3, 0))))
    near = [{"jawOpen": x} for x in (0.0, 0.8, 0.3)]
    assert lent.follow(_tokens(*near)).tolist() == [0, 1, 2]
    wide = [{"jawOpen": x} for x in (0.0, 3.0, 3.0)]
    assert lent.follow(_tokens(*wide)).tolist()[1:] == [3, 3]


def test_it_leaves_where_the_head_moves_on_alike() -> None:
    """Two latents are as good for the jaw; the one that is taken is posed as the reference would have gone on."""
    lent = _led_by(_tokens({"yaw": 0.0}, {"yaw": 1.0}, {"yaw": 1.1, "jawOpen": 3}, {"yaw": -4.0, "jawOpen": 3}))
    assert lent.follow(_tokens({}, {"jawOpen": 3})).tolist()[1] == 2
    carried = _tokens({"yaw": -9.0}, {"yaw": 0.0})
    assert lent.follow(_tokens({}), carried).tolist() == [1]  # as the last of them goes on, not the one before
    assert lent.follow(_tokens({}), carried[:, :0]).tolist() == [0]


def test_the_way_is_the_cheapest_of_all() -> None:
    g = torch.Generator().manual_seed(5)
    theirs, ours = 0.5 * torch.randn(1, 4, 248, generator=g), 0.5 * torch.randn(1, 4, 248, generator=g)
    frames, mouth = theirs[0].view(4, FRAMES_PER_LATENT, -1), mouth_channels(248)[: len(MOTION_NAMES)]
    counts = (LIPS * mouth).index_fill(0, torch.tensor(motion_index("jawOpen")), JAW).repeat(FRAMES_PER_LATENT)

    def cost(way: tuple[int, ...]) -> float:
        total = sum(float((counts * (ours[0, k] - theirs[0, i]).square()).sum()) for k, i in enumerate(way))
        for i, j in pairwise(way):
            after = frames[i + 1, 0] if i < 3 else frames[3, -1]
            total += 0 if j == i + 1 else LEAVE + JOIN * float((after - frames[j, 0])[~mouth].square().sum())
        return total

    found = tuple(_led_by(theirs).follow(ours).tolist())
    ways = sorted(product(range(4), repeat=4), key=cost)
    assert found == ways[0] and cost(ways[1]) > cost(ways[0]) + 1e-3


def test_the_rest_of_the_motion_becomes_the_guides() -> None:
    g = torch.Generator().manual_seed(5)
    lent, motion = _led_by(torch.randn(1, 3, 248, generator=g)), torch.randn(1, 2, 248, generator=g)
    z = torch.zeros(1, 3, 2, 4, 4)
    _, told = lent.step(z, z, 0.9, 0.7, motion)
    mouth, at = mouth_channels(248), lent.follow(motion)
    assert torch.equal(told[..., mouth], motion[..., mouth])
    assert torch.equal(told[..., ~mouth], lent.motion[:, at][..., ~mouth])
    assert _likeness(motion=False).step(z, z, 0.9, 0.7, None)[1] is None


def test_the_guide_is_corrected_for_how_far_the_jaw_is_open() -> None:
    g = torch.Generator().manual_seed(7)
    jaw, yaw = torch.randn(12, generator=g), torch.randn(12, generator=g)
    change, turn = torch.randn(3, 4, 4, generator=g), torch.randn(3, 4, 4, generator=g)
    latents = (jaw.view(12, 1, 1, 1) * change + yaw.view(12, 1, 1, 1) * turn).transpose(0, 1)[None]
    motion = _tokens(*({"jawOpen": float(a), "yaw": float(b)} for a, b in zip(jaw, yaw, strict=True)))
    slopes = slopes_of(1000 * latents, 1000 * motion)  # large, so that the ridge is nothing
    assert torch.allclose(slopes.sum(0), change.flatten(), atol=1e-3)  # all frames of a latent moved alike
    lent = dataclasses.replace(_led_by(motion[:, :1], slopes=slopes), latents=latents[:, :, :1])
    lacks = lent.opened(_tokens({"jawOpen": float(jaw[0]) + 0.5}), motion[:, :1])
    assert torch.allclose(lacks, 0.5 * change[None, :, None], atol=1e-3)
    assert slopes_of(latents, None) is None and slopes_of(latents, motion[..., :6]) is None
    assert not slopes_of(latents[:, :, :1], motion[:, :1]).any()


def test_without_motion_the_nearest_face_is_taken() -> None:
    lent = _likeness(motion=False)
    clean = lent.latents[:, :, [3, 0]] + 0.1 * torch.randn(1, 3, 2, 4, 4)
    clean = torch.where(MASK.bool(), clean, 9.0)  # what lies outside of the face says nothing
    assert lent.nearest(clean).tolist() == [3, 0]


def test_each_time_counts_once() -> None:
    lent = _likeness((0.9, 0.75))
    times = (1.0, 0.9, 0.8, 0.7, 0.0)
    assert [lent.applies(a, b) for a, b in pairwise(times)] == [True, False, True, False]


@pytest.mark.parametrize("n", [0, 1])
def test_carried_latents_stay_as_they_are(n: int) -> None:
    cfg = dataclasses.replace(small_bundle.CONFIG.dit, latent_channels=3)
    z, motion = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 2, 6)

    def still(rows, t, m, resting):
        return torch.zeros_like(z), torch.zeros_like(motion)

    out, _ = solve(still, cfg, z, motion, [1.0, 0.7, 0.0], n, likeness=_likeness())
    assert torch.equal(out[:, :, :n], z[:, :, :n])
    assert not torch.equal(out[:, :, n:], z[:, :, n:])


def test_only_the_mouth_is_left_out() -> None:
    mask, late = (m[0, 0, 0] for m in guide_masks(16, 16))
    assert mask.shape == (16, 16) and mask.min() >= 0 and mask.max() <= 1
    assert mask[10, 7] < 0.1 and mask[10, 8] < 0.1  # mouth
    assert bool((mask[:8] == 1).all() and (mask[:, :4] == 1).all() and (mask[14:] == 1).all())
    assert torch.allclose(mask, mask.flip(1))
    assert torch.equal(mask[:8], late[:8]) and not late[10:].any()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AvatarEngine:
    sampling = dataclasses.replace(small_bundle.CONFIG.sampling, likeness=(0.8,))
    folder = tmp_path_factory.mktemp("likeness") / "bundle"
    return AvatarEngine(small_bundle.write_bundle(folder, spread=0.1, height=64, width=64, sampling=sampling))


@pytest.fixture(scope="module")
def reference(engine: AvatarEngine) -> Reference:
    rng = np.random.default_rng(0)
    return engine.prepare(rng.integers(0, 256, (17, 64, 64, 3), np.uint8), cropped=True)


def test_without_a_scene_the_guide_is_the_reference(engine: AvatarEngine, reference: Reference) -> None:
    guide = engine.likeness(reference, None, (0.8,))
    assert guide is not None and guide.times == (0.8,)
    assert torch.equal(guide.latents, reference.context.latents[:, : engine.config.dit.latent_channels])
    assert guide.motion is reference.context.motion
    assert engine.likeness(reference, None, ()) is None


@pytest.mark.parametrize("somebody", [False, True])
def test_in_a_scene_the_guide_is_the_person_before_it(
    engine: AvatarEngine, reference: Reference, monkeypatch: pytest.MonkeyPatch, somebody: bool
) -> None:
    """An empty place gets all of the person, a picture of somebody the head alone."""
    mattes = np.zeros((17, 64, 64), np.float32)
    mattes[:, 16:, 24:40] = 1
    monkeypatch.setattr("avatar_rt.engine.person_mattes", lambda frames: mattes[: len(frames)])
    monkeypatch.setattr("avatar_rt.engine.detect_faces", lambda picture: np.zeros((int(somebody), 5), np.float32))
    scene = np.full((128, 128, 3), 90, np.uint8)
    guide = engine.likeness(reference, scene, (0.8,))
    assert guide is not None
    part = mattes * ~blank_head(scene[:64, :64])[1] if somebody else mattes
    video = to_video(place_person(reference.frames, part, scene[:64, :64]))
    wanted = engine.vae.normalize(engine.vae.encode(video)[0].float())[:, :, 1:]
    assert torch.allclose(guide.latents, wanted, atol=1e-5)
    part = reference.context.latents.shape[2]  # what the transformer attends to; the guide is all of the clip
    assert guide.latents.shape[2] == guide.motion.shape[1] == 4 > part
    assert torch.allclose(guide.motion[:, :part], reference.context.motion, atol=1e-4)


def test_a_request_may_turn_it_off_or_move_it(engine: AvatarEngine, reference: Reference) -> None:
    assert engine.config.sampling.likeness == (0.8,)

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
