"""A person cut out of a clip and put before another place."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from avatar_rt.scene.matte import (
    EVERY,
    STRIP,
    _grab,
    _prior,
    _regained,
    _standing,
    person_mattes,
    place_person,
    take_out,
)

SIZE = 96


def _clip(count: int, hair: tuple[int, int, int] = (40, 30, 25), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [F, SIZE, SIZE, 3] of a drawn bust that sways before a speckled wall, and where it is, bool."""
    rng = np.random.default_rng(seed)
    wall = np.clip(rng.normal((70, 130, 80), 8, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    frames, masks = [], []
    for i in range(count):
        middle = SIZE // 2 + round(2 * np.sin(i / 5))
        frame, mask = wall.copy(), np.zeros((SIZE, SIZE), np.uint8)
        for at, axes, colour in (
            ((middle, SIZE), (40, 18), (150, 40, 60)),
            ((middle, 42), (28, 34), hair),
            ((middle, 50), (19, 27), (205, 160, 130)),
        ):
            cv2.ellipse(frame, at, axes, 0, 0, 360, colour, -1)
            cv2.ellipse(mask, at, axes, 0, 0, 360, 1, -1)
        for eye in (-8, 8):
            cv2.ellipse(frame, (middle + eye, 44 + round(2 * np.cos(i / 4))), (4, 2), 0, 0, 360, (40, 30, 60), -1)
        cv2.rectangle(frame, (middle - 8, 70), (middle + 8, 90), (195, 150, 120), -1)
        cv2.rectangle(mask, (middle - 8, 70), (middle + 8, 90), 1, -1)
        noise = rng.normal(0, 3, frame.shape)
        frames.append(np.clip(frame + noise, 0, 255).astype(np.uint8))
        masks.append(mask.astype(bool))
    return np.stack(frames), np.stack(masks)


@pytest.mark.parametrize("hair", [(40, 30, 25), (220, 200, 120)])
def test_finds_the_person(hair: tuple[int, int, int]) -> None:
    frames, masks = _clip(13, hair)
    found = person_mattes(frames)
    assert found.shape == masks.shape and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    both, either = ((found > 0.5) & masks).sum(), ((found > 0.5) | masks).sum()
    assert both / either > 0.9


@pytest.mark.parametrize("count", [1, 2, EVERY, EVERY + 1, 10])
def test_any_number_of_frames_and_the_same_each_time(count: int) -> None:
    frames, _ = _clip(count)
    found = person_mattes(frames)
    assert found.shape == frames.shape[:3]
    cv2.setRNGSeed(9)
    assert np.array_equal(found, person_mattes(frames))


def test_a_picture_of_one_colour_gives_a_bust() -> None:
    """Nothing to tell a person by: what is certain stays, and nothing fails."""
    found = person_mattes(np.full((2, SIZE, SIZE, 3), 128, np.uint8))
    assert found[:, SIZE // 2, SIZE // 2].min() > 0.9 and found[:, 2, 2].max() < 0.1


def test_one_bad_picture_is_outvoted() -> None:
    frames, masks = _clip(9 * EVERY)
    frames[4 * EVERY] = 128
    found = person_mattes(frames)
    bad, good = ((m > 0.5) & w for m, w in ((found[4 * EVERY], masks[4 * EVERY]), (found[0], masks[0])))
    assert abs(int(bad.sum()) - int(good.sum())) < 0.1 * good.sum()


def test_wall_between_hair_and_the_pictures_edge_is_not_the_person() -> None:
    """A strip of wall that was taken for the person is given up; hair that reaches the edge is wider."""
    frames, _ = _clip(1)
    assert 0 < _grab(frames[0], _strip(frames[0], (40, 56)))[0].mean() < STRIP[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avatar_rt.scene.matte._prior", lambda height, width: _strip(frames[0], (40, 56)))
        assert person_mattes(frames)[0, 0].max() < 0.1
        patch.setattr("avatar_rt.scene.matte._prior", lambda height, width: _strip(frames[0], (20, 76)))
        assert person_mattes(frames)[0, 0, 24:72].min() > 0.9


def _strip(frame: np.ndarray, across: tuple[int, int]) -> np.ndarray:
    """A mask to begin with, in which all from the middle to the upper edge is certain, so wide."""
    prior = _prior(*frame.shape[:2])
    prior[: SIZE // 2, slice(*across)] = cv2.GC_FGD
    return prior


def test_places_the_person_before_a_scene() -> None:
    frames, scene = np.full((2, 4, 4, 3), 200, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    mattes = np.zeros((2, 4, 4), np.uint8)
    mattes[0, 1:3], mattes[1] = 255, 128
    made = place_person(frames, mattes, scene)
    assert made.dtype == np.uint8
    assert (made[0, 1:3] == 200).all() and (made[0, 0] == 100).all() and (made[1] == 150).all()


def _disc(size: int, colour: tuple[int, int, int], wall: tuple[int, int, int], grown: float = 0.0):
    """A soft-edged disc before a wall, fp32 [size, size, 3], and how much of each pixel it is."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    away = np.hypot(x - size / 2, y - size / 2) - (0.3 + grown / 128) * size
    share = np.clip(0.5 - away / (size / 42), 0, 1).astype(np.float32)[..., None]
    return share * np.float32(colour) + (1 - share) * np.float32(wall), share[..., 0]


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("grown", [-1.0, 1.5])
def test_the_old_place_is_taken_out_of_the_edge(scale: int, grown: float) -> None:
    """However the matte lies, one and a half pixels too wide or one too narrow."""
    person, wall, scene = (170, 120, 100), (40, 200, 60), np.full((128 * scale,) * 2 + (3,), (30, 30, 90), np.uint8)
    small, large = (_disc(n, person, wall)[0].round().astype(np.uint8)[None] for n in (128, 128 * scale))
    wanted, _ = _disc(128 * scale, person, (30, 30, 90))
    matte = _disc(128, person, wall, grown)[1][None]
    colours, shares = take_out(small, matte, large)
    assert colours.dtype == shares.dtype == np.uint8 and colours.shape == large.shape
    plain = (255 * cv2.resize(matte[0], large.shape[2:0:-1])).round().astype(np.uint8)[None]
    before, after = (np.abs(place_person(*made, scene) - wanted).mean() for made in ((large, plain), (colours, shares)))
    assert after < 0.35 * before
    middle = np.s_[:, 50 * scale : 78 * scale, 50 * scale : 78 * scale]
    assert np.array_equal(colours[middle], large[middle]) and (shares[middle] == 255).all() and not shares[:, 0].any()


def test_where_colours_do_not_tell_the_matte_stays() -> None:
    frame = np.full((1, 128, 128, 3), 90, np.uint8)
    matte = _disc(128, (0, 0, 0), (0, 0, 0))[1][None]
    colours, shares = take_out(frame, matte, frame)
    assert np.array_equal(colours, frame)
    assert np.abs(shares / 255 - matte).max() < 0.06  # softened by half a pixel


def test_a_pattern_that_stands_while_the_head_moves_is_behind_it() -> None:
    """Also one of the hair's colour, beside the hair; of a head that does not move nothing is said."""
    frames, masks = _clip(41)
    at = np.s_[:, 20:60, 4:16]
    boxes = (np.indices((40, 12)).sum(0) // 5 % 2).astype(bool)
    frames[at][:, boxes] = (40, 30, 25)
    standing = _standing(frames)
    assert standing[22:58, 6:14].mean() > 0.3 and not standing[masks.any(0)].any()
    assert person_mattes(frames)[at].mean() < 0.05
    assert not _standing(frames[:1].repeat(9, 0)).any()


def test_an_outline_that_a_turning_head_does_not_move_is_no_wall() -> None:
    frames, _ = _clip(41)
    frames[:, 8:12, 30:66] = (250, 250, 250)  # a crown's edge, up and down alone
    assert not _standing(frames)[5:15, 32:64].any()


def test_hair_that_is_lost_for_long_is_what_the_rest_of_the_clip_says() -> None:
    """And a head that has turned away is not: there the wall is seen."""
    person = np.zeros((64, 64), bool)
    person[16:56, 20:44] = True
    pictures = np.where(person[..., None], np.uint8([60, 40, 30]), np.uint8([90, 160, 90])) + np.zeros(
        (10, 1, 1, 1), np.uint8
    )
    found = np.repeat(person[None], 10, 0).astype(np.float32)
    found[6:, 16:28] = 0  # the crown, in four of ten pictures
    pictures[9, 16:56, 20:26] = (90, 160, 90)  # there is the wall now
    found[9, 16:56, 20:26] = 0
    kept = _regained(pictures, found)
    assert np.array_equal(kept[:9], np.repeat(person[None], 9, 0))
    assert np.array_equal(kept[9, 16:56, 26:44], np.ones((40, 18))) and not kept[9, :, :26].any()
    found[:] = person
    found[9, 16:18] = 0  # an outline that moves
    assert np.array_equal(_regained(pictures, found), found)
