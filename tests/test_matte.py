"""A person cut out of a clip and put before another place."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from avatar_rt.scene.matte import EVERY, STRIP, _grab, _prior, _standing, person_mattes, place_person

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
    mattes = np.zeros((2, 4, 4), np.float32)
    mattes[0, 1:3], mattes[1] = 1, 0.5
    made = place_person(frames, mattes, scene)
    assert made.dtype == np.uint8
    assert (made[0, 1:3] == 200).all() and (made[0, 0] == 100).all() and (made[1] == 150).all()


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
