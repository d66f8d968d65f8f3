"""Windows cut around the mouth: what is left of each part of a batch, where it is taken to be, bad sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_stages import CFG, SmallTable, build

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket
from training.methods.windows import Drawer

LARGE = replace(CFG, height=64, width=64)  # 8 x 8 latents, 4 x 4 patches


def _table(cfg: AvatarConfig = LARGE) -> SmallTable:
    table = SmallTable(cfg)
    table.weight = torch.zeros_like(table.weight)
    table.weight[:, 1, 5:7, 3:5] = 1  # the mouth, below the middle
    return table


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _drawn(seed: int, kind: str = "free", cut: int = 4) -> tuple[Any, Any, SmallTable]:
    """A batch cut around the mouth, the same one whole, and the table."""
    table, bucket = _table(), Bucket(2, people=4)
    whole, part = (
        Drawer(table, LARGE)(table.train, _generator(seed), b, kind, _generator(1))
        for b in (bucket, replace(bucket, cut=cut))
    )
    return part, whole, table


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_window_is_a_part_of_the_whole_one(seed: int) -> None:
    part, whole, _ = _drawn(seed)
    top, left, height, width = part.cut
    assert (height, width) == (4, 4) and whole.cut is None
    where = (..., slice(2 * top, 2 * top + 4), slice(2 * left, 2 * left + 4))
    for name in ("x", "anchor", "weight"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[where]), name
    assert part.weight[:, 1].any(), "the mouth is not in it"
    assert torch.equal(part.ref_latents, whole.ref_latents) and torch.equal(part.audio, whole.audio)
    assert part.to(torch.device("cpu")).cut == part.cut


def test_places_move_and_stay_inside() -> None:
    table, alike = _table(), torch.Generator().manual_seed(0)
    bucket, g = Bucket(1, people=2, cut=4), torch.Generator().manual_seed(0)
    places = {Drawer(table, LARGE)(table.train, g, bucket, "free", alike).cut[:2] for _ in range(40)}
    assert len(places) > 3 and all(0 <= top <= 2 and 0 <= left <= 2 for top, left in places)


def test_a_picture_of_the_person_is_cut_alike() -> None:
    part, _, table = _drawn(0)
    shown = Drawer(table, LARGE).picture(part, 2, 1.0, torch.Generator().manual_seed(3))
    top, left = 2 * part.cut[0], 2 * part.cut[1]
    for i, clip in enumerate(part.clip.tolist()):
        latents = table.latents[clip].float()[..., top : top + 4, left : left + 4]
        assert (latents == shown.anchor[i, :4, 0]).flatten(1).all(1).any()


def test_positions_are_those_of_the_whole_frame() -> None:
    dit = VideoRefDiT(LARGE.dit)
    whole = dit._positions((2, 4, 4), torch.device("cpu"), motion=True).unflatten(0, (2, 17))
    cut = dit._positions((2, 2, 2), torch.device("cpu"), motion=True, cut=(2, 1, 4, 4)).unflatten(0, (2, 5))
    patches = whole[:, :16].unflatten(1, (4, 4))[:, 2:4, 1:3].flatten(1, 2)
    assert torch.equal(cut[:, :4], patches) and torch.equal(cut[:, 4], whole[:, 16])


def test_a_cut_that_is_all_of_the_frame_changes_nothing() -> None:
    torch.manual_seed(0)
    method = build(A2VMethod, A2VSettings(buckets=(Bucket(2, people=2),)), cfg=LARGE)
    b = method.draw(method.table.train, torch.Generator().manual_seed(0), Bucket(2, people=2), "free")
    whole = replace(b, cut=(0, 0, 4, 4))
    values = [method.loss(x, torch.full((2,), 0.5), torch.Generator().manual_seed(1), step=None)["loss"]
              for x in (b, whole)]  # fmt: skip
    assert torch.equal(*values)


def test_steps_on_cut_windows_train() -> None:
    bucket = Bucket(1, people=2, cut=4)
    method = build(A2VMethod, A2VSettings(buckets=(bucket,), read_weight=1.0, next_rate=0.0), cfg=LARGE)
    values = method.step(0, torch.Generator().manual_seed(0))
    values["loss"].backward()
    assert float(values["tokens"]) == 2 * 4 and method.module["dit"].patch_embedding.weight.grad is not None


@pytest.mark.parametrize("side", [3, 10])
def test_a_cut_that_cannot_be_is_refused(side: int) -> None:
    with pytest.raises(InputError, match=f"cut: expected a multiple of 2 up to 8, got {side}"):
        _drawn(0, cut=side)
