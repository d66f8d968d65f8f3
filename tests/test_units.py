"""Which of a reference's pieces a guide is put together from."""

from __future__ import annotations

from itertools import pairwise, product

import torch

from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, motion_index
from avatar_rt.scene.units import HEAD_LEAVE, cheapest, head_units, mouth_units

CHANNELS = len(MOTION_NAMES)


def _frames(*frames: dict[str, float]) -> torch.Tensor:
    """Motion [F, M] in whose frames these channels have these values, and the others none."""
    out = torch.zeros(len(frames), CHANNELS)
    for i, channels in enumerate(frames):
        for name, value in channels.items():
            out[i, motion_index(name)] = value
    return out


def _latents(*frames: dict[str, float]) -> torch.Tensor:
    """[T, 4, M], four frames alike each."""
    return _frames(*frames)[:, None].expand(-1, FRAMES_PER_LATENT, -1)


def test_the_way_is_the_cheapest_of_all() -> None:
    g = torch.Generator().manual_seed(5)
    target, join = torch.rand(4, 4, generator=g), torch.rand(4, 4, generator=g)

    def cost(way: tuple[int, ...]) -> float:
        steps = sum(float(join[i, j]) for i, j in pairwise(way))
        return steps + sum(float(target[k, i]) for k, i in enumerate(way))

    ways = sorted(product(range(4), repeat=4), key=cost)
    assert tuple(cheapest(target, join).tolist()) == ways[0] and cost(ways[1]) > cost(ways[0]) + 1e-4
    assert cheapest(target[:1], join).tolist() == [int(target[0].argmin())]


def test_heads_go_on_as_in_the_reference_unless_the_jaw_is_worth_leaving_it() -> None:
    reference = _latents(*({"jawOpen": x} for x in (0, 1, 0, 9, 0)))
    near = _latents(*({"jawOpen": x} for x in (0.0, 0.8, 0.3)))
    assert head_units(near, reference).tolist() == [0, 1, 2]
    wide = _latents(*({"jawOpen": x} for x in (0.0, 9.0, 9.0)))
    assert head_units(wide, reference).tolist()[1:] == [3, 3]


def test_heads_leave_where_the_reference_moves_on_alike() -> None:
    """Two latents are as good for the jaw; the one that is taken is posed as the reference would have gone on."""
    far = 2 * HEAD_LEAVE**0.5
    reference = _latents({"yaw": 0.0}, {"yaw": 1.0}, {"yaw": 1.1, "jawOpen": far}, {"yaw": -4.0, "jawOpen": far})
    assert head_units(_latents({}, {"jawOpen": far}), reference).tolist()[1] == 2
    before = _frames({"yaw": 0.0})[0]
    assert head_units(_latents({}), reference, before).tolist() == [1]  # what followed such a pose
    assert head_units(_latents({}), reference).tolist() == [0]


def test_mouths_are_as_open_as_is_wanted_and_seen_on_a_head_turned_alike() -> None:
    reference = _frames({}, {"jawOpen": 1}, {"jawOpen": 2}, {"jawOpen": 2, "yaw": 3}, {"jawOpen": 2, "mouthPucker": 3})
    heads = torch.tensor([0, 0])
    assert mouth_units(_frames({"jawOpen": 2}, {}), reference, heads).tolist() == [2, 0]
    assert mouth_units(_frames({"jawOpen": 2})[:1], reference, torch.tensor([3])).tolist() == [3]
    assert mouth_units(_frames({"jawOpen": 2, "mouthPucker": 3}), reference, heads[:1]).tolist() == [4]


def test_a_mouth_goes_on_where_it_makes_no_difference() -> None:
    reference = _frames(*({"jawOpen": x} for x in (1.0, 0.0, 1.0, 0.0)))
    told = _frames({"jawOpen": 0.0}, {"jawOpen": 1.0}, {"jawOpen": 0.0})
    assert mouth_units(told, reference, torch.zeros(3, dtype=torch.int64)).tolist() == [1, 2, 3]
