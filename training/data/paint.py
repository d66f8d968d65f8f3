"""What an identity looks like on the surface: skin, brows, eyes, lips, beard, hair; and the texture of it all."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from training.data import atlas
from training.data.atlas import smooth
from training.data.hair import HairStyle, growth

SKIN_TONES = np.array(
    [[247, 222, 206], [240, 205, 182], [228, 185, 155], [212, 164, 128], [186, 134, 98], [150, 101, 70], [112, 73, 50],
     [78, 50, 37], [52, 35, 29]], np.float32) / 255  # fmt: skip
HAIR_COLOURS = {
    "black": (22, 18, 18), "dark brown": (52, 34, 24), "brown": (92, 60, 36), "light brown": (136, 96, 60),
    "auburn": (112, 48, 26), "red": (172, 78, 32), "blond": (214, 178, 110), "pale blond": (236, 216, 168),
    "grey": (140, 138, 136), "white": (226, 224, 220), "pink": (220, 110, 160), "blue": (50, 90, 180),
}  # fmt: skip
EYE_COLOURS = {"brown": (84, 50, 26), "dark brown": (42, 26, 16), "hazel": (120, 90, 44), "green": (84, 120, 70),
               "blue": (84, 130, 176), "grey": (130, 140, 146)}  # fmt: skip
BEARDS = ("none", "stubble", "moustache", "goatee", "full", "chin strap")


@dataclass(frozen=True)
class Looks:
    """Colours (sRGB 0..1) and paint of an identity."""

    skin: np.ndarray
    skin_depth: float  # 0 palest, 1 darkest
    hair: np.ndarray
    hair_name: str
    brow: np.ndarray
    brow_shape: tuple[float, float, float, float]  # thickness, arch, length, strength
    eye: np.ndarray
    eye_name: str
    lips: np.ndarray
    lip_strength: float
    beard: str
    beard_strength: float
    freckles: float
    moles: int
    blush: float
    shadow: np.ndarray | None  # eye shadow
    age: float
    seed: int


def _colour(rgb: tuple[int, int, int], rng: np.random.Generator, spread: float = 0.07) -> np.ndarray:
    tint = rng.uniform(1 - spread, 1 + spread) * rng.uniform(0.95, 1.05, 3)
    return np.clip(np.array(rgb, np.float32) / 255 * tint, 0, 1)


def draw_looks(rng: np.random.Generator, sex: str, age: float, ethnicity: np.ndarray) -> Looks:
    """Looks of a ``sex`` ("female", "male"), ``age`` 0..1 and ``ethnicity`` [caucasian, asian, african] weights."""
    depth = float(np.clip(ethnicity @ [0.15, 0.32, 0.78] + rng.normal(0, 0.11), 0, 1))
    place = depth * (len(SKIN_TONES) - 1)
    low = min(int(place), len(SKIN_TONES) - 2)
    skin = SKIN_TONES[low] * (1 - place + low) + SKIN_TONES[low + 1] * (place - low)
    skin = np.clip(skin * rng.normal(1, [0.03, 0.03, 0.055]), 0.05, 1)
    names = list(HAIR_COLOURS)
    fair = np.clip(1.1 - 2.2 * depth, 0.02, 1)
    odds = np.array([2.5, 2, 1.8 * fair, 1.5 * fair, fair, 1.1 * fair, 1.8 * fair, fair, 4 * age**2, 3 * age**3,
                     0.12, 0.12])  # fmt: skip
    hair_name = str(rng.choice(names, p=odds / odds.sum()))
    hair = _colour(HAIR_COLOURS[hair_name], rng, 0.2)
    eyes = list(EYE_COLOURS)
    odds = np.array([2, 2 + 4 * depth, 1.2 * fair, 1.2 * fair, 2 * fair, 1 * fair])
    eye_name = str(rng.choice(eyes, p=odds / odds.sum()))
    made_up = sex == "female" and rng.random() < 0.6
    lips = (
        skin * np.array([0.92, 0.66, 0.66])
        if not made_up
        else _colour(
            [(180, 40, 50), (150, 30, 70), (200, 90, 100), (120, 30, 40), (205, 110, 90)][rng.integers(5)], rng, 0.15
        )
    )
    brow_base = hair if hair_name not in ("white", "pale blond", "pink", "blue") else skin * 0.55
    beard = "none" if sex == "female" else str(rng.choice(BEARDS, p=[0.38, 0.16, 0.1, 0.12, 0.18, 0.06]))
    return Looks(
        skin=skin,
        skin_depth=depth,
        hair=hair,
        hair_name=hair_name,
        brow=np.clip(brow_base * rng.uniform(0.45, 0.95), 0, 1),
        brow_shape=(rng.uniform(0.018, 0.05) * (1.25 if sex == "male" else 0.9), rng.uniform(-0.01, 0.09),
                    rng.uniform(0.4, 0.54), rng.uniform(0.55, 1.0)),
        eye=_colour(EYE_COLOURS[eye_name], rng, 0.2),
        eye_name=eye_name,
        lips=lips,
        lip_strength=float(rng.uniform(0.55, 0.95)) if made_up else float(rng.uniform(0.5, 0.9)),
        beard=beard,
        beard_strength=float(rng.uniform(0.7, 1.0)),
        freckles=float(rng.uniform(0.4, 1)) if depth < 0.45 and rng.random() < 0.22 else 0.0,
        moles=int(rng.choice([0, 0, 0, 1, 1, 2, 3])),
        blush=float(rng.uniform(0, 0.5)),
        shadow=_colour(tuple(rng.integers(40, 160, 3)), rng) if made_up and rng.random() < 0.5 else None,
        age=age,
        seed=int(rng.integers(1 << 31)),
    )  # fmt: skip


def _noise(rng: np.random.Generator, shape: tuple[int, int], rows: int, columns: int) -> np.ndarray:
    """Smooth noise of unit spread with about rows x columns bumps."""
    small = rng.standard_normal((rows, columns)).astype(np.float32)
    return cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def _over(picture: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    """Lays ``colour`` ([3] or a picture) over ``picture`` in place."""
    picture += (colour - picture) * alpha[..., None]


def _brows(picture: np.ndarray, p: np.ndarray, looks: Looks, rng: np.random.Generator) -> None:
    thickness, arch, length, strength = looks.brow_shape
    along = (np.abs(p[..., 0]) - 0.1) / (length - 0.1)
    middle = 7.47 + arch * np.sin(np.clip(along, 0, 1) * 2.4) - 0.03 * np.clip(along, 0, 1) ** 3
    width = thickness * (1 - 0.65 * np.clip(along, 0, 1) ** 2)
    inside = (
        smooth(1.35, 0.75, np.abs(p[..., 1] - middle) / width) * smooth(-0.06, 0.06, along) * smooth(1.05, 0.9, along)
    )
    inside = inside * (p[..., 2] > 0.9) * (0.8 + 0.2 * _noise(rng, inside.shape, 190, 380))
    _over(picture, looks.brow, np.clip(inside * strength, 0, 1))


def beard_mask(p: np.ndarray, beard: str) -> np.ndarray:
    """Where a beard grows, 0..1, for template coordinates [..., 3]."""
    x, y, z = np.abs(p[..., 0]), p[..., 1], p[..., 2]
    if beard == "none":
        return np.zeros_like(x)
    moustache = smooth(0.36, 0.28, x) * smooth(6.655, 6.70, y + 0.25 * x) * smooth(6.86, 6.82, y) * (z > 1.2)
    goatee = smooth(0.30, 0.22, x) * smooth(6.56, 6.48, y) * smooth(6.0, 6.12, y) * (z > 0.85)
    top = np.interp(z, [0.5, 0.75, 1.2, 1.5], [7.1, 6.95, 6.68, 6.56])
    jaw = smooth(0.0, -0.10, y - top) * smooth(6.0, 6.1, y) * smooth(0.45, 0.6, z)
    strap = jaw * smooth(0.16, 0.08, np.abs(y - np.interp(z, [0.5, 1.45], [6.75, 6.25])))
    sides = smooth(0.24, 0.30, x) * smooth(0.36, 0.32, x) * smooth(6.86, 6.82, y) * smooth(6.35, 6.45, y) * (z > 1.2)
    return {
        "stubble": np.maximum.reduce([moustache, goatee, jaw]) * 0.55,
        "moustache": moustache,
        "goatee": np.maximum.reduce([moustache, goatee, sides]),
        "full": np.maximum.reduce([moustache, goatee, jaw, sides]),
        "chin strap": np.maximum(strap, goatee * smooth(6.42, 6.32, y)),
    }[beard]


def _wrinkles(picture: np.ndarray, p: np.ndarray, age: float) -> None:
    x, y, z = np.abs(p[..., 0]), p[..., 1], p[..., 2]
    fold = np.exp(-(((x - (0.24 + 0.42 * (6.95 - y))) / 0.022) ** 2)) * smooth(6.5, 6.6, y) * smooth(6.98, 6.9, y)
    lines = sum(np.exp(-(((y - h - 0.03 * np.cos(4 * x)) / 0.012) ** 2)) for h in (7.68, 7.76, 7.84)) * smooth(
        0.45, 0.3, x
    )
    bags = np.exp(-(((y - 7.1 + 0.25 * (x - 0.31) ** 2) / 0.02) ** 2)) * smooth(0.17, 0.1, np.abs(x - 0.3))
    depth = np.clip(age - 0.25, 0, 1) * 0.55 * np.clip(fold + 0.7 * lines + 0.6 * bags, 0, 1) * (z > 0.9)
    picture *= 1 - depth[..., None] * np.array([0.55, 0.7, 0.75], np.float32)


def _spots(picture: np.ndarray, p: np.ndarray, looks: Looks, rng: np.random.Generator) -> None:
    if looks.freckles:
        where = _noise(rng, p.shape[:2], 150, 300) + 0.5 * _noise(rng, p.shape[:2], 20, 40)
        zone = smooth(0.75, 0.4, np.abs(p[..., 0])) * smooth(6.6, 6.85, p[..., 1]) * smooth(7.5, 7.2, p[..., 1])
        _over(
            picture,
            looks.skin * [0.62, 0.46, 0.36],
            looks.freckles * 0.8 * zone * smooth(0.7, 1.2, where) * (p[..., 2] > 0.8),
        )
    for _ in range(looks.moles):
        x, y = rng.choice([-1, 1]) * rng.uniform(0.12, 0.55), rng.uniform(6.35, 7.8)
        near = np.hypot(p[..., 0] - x, p[..., 1] - y) + 9 * (p[..., 2] < 0.9)
        _over(picture, looks.skin * 0.28, smooth(0.034, 0.022, near) * 0.9)


def _head(looks: Looks, style: HairStyle, rng: np.random.Generator) -> np.ndarray:
    maps = atlas.load_maps()
    p, shape = maps.head, maps.head.shape[:2]
    x, y, z = np.abs(p[..., 0]), p[..., 1], p[..., 2]
    tone = 1 + 0.035 * _noise(rng, shape, 12, 24) + 0.015 * _noise(rng, shape, 96, 192)
    picture = np.ones((*shape, 3), np.float32) * looks.skin.astype(np.float32) * tone[..., None]
    warm = np.exp(-(((x - 0.42) / 0.2) ** 2) - ((y - 6.92) / 0.18) ** 2) + np.exp(
        -((x / 0.13) ** 2) - ((y - 6.95) / 0.12) ** 2
    )
    _over(picture, looks.skin * [1.02, 0.72, 0.68], np.clip(warm, 0, 1) * looks.blush * (z > 0.7))
    sockets = np.exp(-(((x - 0.31) / 0.22) ** 2) - ((y - 7.27) / 0.13) ** 2) * (z > 0.9)
    _over(picture, looks.skin * 0.78, 0.35 * sockets)
    if looks.shadow is not None:
        _over(picture, looks.shadow, 0.55 * sockets * smooth(7.24, 7.32, y))
    lids = smooth(0.2, 0.8, maps.masks["eyelids"])
    _over(picture, looks.skin * 0.62, 0.35 * lids)
    _wrinkles(picture, p, looks.age)
    _spots(picture, p, looks, rng)
    lips = smooth(0.25, 0.6, maps.masks["lips"])
    _over(picture, looks.lips * (0.9 + 0.1 * tone[..., None]), lips * looks.lip_strength)
    _over(picture, looks.lips * 0.45, lips * np.exp(-(((y - 6.607 + 0.05 * x**2) / 0.012) ** 2)) * 0.7)
    streaks = 1 + 0.2 * _noise(rng, shape, 12, 300) + 0.12 * _noise(rng, shape, 100, 200)
    hair = looks.hair * streaks[..., None]
    beard = beard_mask(p, looks.beard) * (1 - lips) * np.clip(0.8 + 0.25 * _noise(rng, shape, 190, 380), 0, 1)
    _over(picture, hair * 0.85, beard * looks.beard_strength)
    _brows(picture, p, looks, rng)
    inside = growth(p, style) + 0.025 * _noise(rng, shape, 60, 200)
    scalp = smooth(-0.025, 0.03, inside) * (1 - smooth(0.2, 0.5, maps.masks["ears"]))
    _over(picture, hair, scalp * (0.55 if style.name == "cropped" else 0.98))
    return picture


def _eye(looks: Looks) -> np.ndarray:
    row, column = np.mgrid[0:64, 0:64].astype(np.float32)
    r = np.hypot(row - 31.5, column - 31.5) / 31
    picture = np.ones((64, 64, 3), np.float32) * np.array([0.93, 0.91, 0.90], np.float32)
    picture *= (1 - 0.25 * smooth(0.6, 1.0, r))[..., None]
    _over(picture, looks.eye, smooth(0.58, 0.53, r))
    _over(picture, looks.eye * 0.35, smooth(0.10, 0.04, np.abs(r - 0.53)))
    _over(picture, np.full(3, 0.015), smooth(0.25, 0.2, r))
    _over(picture, np.full(3, 1.0), smooth(0.12, 0.07, np.hypot(row - 22, column - 25) / 31) * 0.9)
    return picture


def paint_head(looks: Looks, style: HairStyle, frames: np.ndarray) -> np.ndarray:
    """The atlas without clothes, linear light float32 [HEIGHT, WIDTH, 3]; ``frames`` is the colour of the glasses."""
    rng = np.random.default_rng(looks.seed)
    out = np.ones((atlas.HEIGHT, atlas.WIDTH, 3), np.float32) * looks.skin.astype(np.float32)
    out[: atlas.HEAD_ROWS] = _head(looks, style, rng)
    out[atlas.STRIP : atlas.STRIP + 64, : atlas.EYE_CELL] = _eye(looks)
    dull = 1 - 0.25 * looks.age
    plain = {"teeth": np.array([0.93, 0.90, 0.82 * dull]), "tongue": np.array([0.70, 0.33, 0.33]),
             "mouth": np.array([0.24, 0.07, 0.07]),
             "lashes": np.array([0.04, 0.03, 0.03]), "glasses": frames}  # fmt: skip
    for name, colour in plain.items():
        out[atlas.swatch(name)] = colour
    wide = atlas.HAIR_COLUMNS[1] - atlas.HAIR_COLUMNS[0]
    locks = 1 + 0.25 * _noise(rng, (64, wide), 3, 90) + 0.12 * _noise(rng, (64, wide), 10, 200)
    out[atlas.STRIP :, atlas.HAIR_COLUMNS[0] :] = looks.hair * locks[..., None]
    return np.clip(out, 0, 1) ** np.float32(2.2)
