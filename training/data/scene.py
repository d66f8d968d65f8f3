"""Everything about a clip that is not the person: background, light, clothes, camera."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from training.data import atlas
from training.data.atlas import smooth
from training.data.raster import Light

BACKGROUNDS = ("plain", "gradient", "striped", "blurred", "room", "tiled", "bokeh", "leafy", "window")
NECKLINES = ("crew", "v-neck", "scoop", "shirt", "high", "jacket")
COLOURS = {
    "red": (178, 38, 42), "green": (44, 120, 66), "blue": (46, 78, 160), "yellow": (214, 178, 60),
    "white": (228, 226, 222), "black": (30, 30, 34), "grey": (120, 122, 126), "purple": (110, 58, 140),
    "orange": (214, 116, 44), "pink": (214, 130, 150), "brown": (104, 70, 46), "teal": (40, 120, 124),
}  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """How the picture is taken. ``distance`` in the mesh's units; the rest in the picture's.

    ``frame`` [3]: offset of the crop from the face, in crop widths, and its size relative to the standard crop.
    """

    distance: float
    frame: tuple[float, float, float]
    blur: float
    noise: float
    quality: int  # of JPEG; 100 is none
    gain: np.ndarray


@dataclass(frozen=True)
class Scene:
    seed: int
    background: str
    clothes: str
    neckline: str
    light: Light
    camera: Camera
    attributes: dict[str, object]


def draw_scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = np.random.default_rng([seed, 12])
    turn, rise = rng.uniform(-1.2, 1.2), rng.uniform(-0.1, 0.9)
    direction = np.array([np.sin(turn) * np.cos(rise), np.sin(rise), np.cos(turn) * np.cos(rise)])
    warmth = rng.normal(0, 0.12)
    key = rng.uniform(0.5, 0.95) * np.array([1 + warmth, 1, 1 - warmth])
    cool = rng.normal(0, 0.1)
    fill = rng.uniform(0.25, 0.5) * np.array([1 - cool, 1, 1 + cool])
    seen = (
        0.55 * key.mean() * max(direction[2], 0.3) + 0.6 * fill.mean()
    )  # by a face; the camera sets its exposure by it
    exposure = rng.uniform(0.5, 0.66) / seen
    key, fill = key * exposure, fill * exposure
    rim = rng.uniform(0, 0.5) * rng.uniform(0.6, 1.2, 3) * (rng.random() < 0.4)
    light = Light(direction, key, fill, fill * rng.uniform(0.35, 0.8), rim)
    camera = Camera(
        distance=float(rng.uniform(7, 14)),
        frame=(float(rng.normal(0, 0.012)), float(rng.normal(0, 0.012)), float(rng.uniform(0.96, 1.06))),
        blur=float(rng.choice([0, 0, 0.3, 0.4])),
        noise=float(rng.choice([0.0, 1.0, 2.0, 3.0], p=[0.4, 0.35, 0.2, 0.05])),
        quality=int(rng.choice([100, 92, 85], p=[0.6, 0.25, 0.15])),
        gain=rng.normal(1, 0.03, 3).astype(np.float32) * np.float32(rng.uniform(0.88, 1.12)),
    )
    background, neckline = str(rng.choice(BACKGROUNDS)), str(rng.choice(NECKLINES))
    clothes = str(rng.choice(list(COLOURS)))
    side = "left" if turn < -0.35 else "right" if turn > 0.35 else "front"
    attributes = {"background": background, "clothes": clothes, "neckline": neckline, "light": side}
    return Scene(seed, background, clothes, neckline, light, camera, attributes)


def _palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours that go together, sRGB 0..1 [count, 3]."""
    base = rng.uniform(0.12, 0.9) * np.clip(rng.normal(1, 0.22, 3), 0.4, 1.5)
    return np.clip(base + rng.normal(0, 0.17, (count, 1)) + rng.normal(0, 0.09, (count, 3)), 0.02, 0.98).astype(
        np.float32
    )


def _boxes(rng: np.random.Generator, picture: np.ndarray, count: int, lowest: float) -> None:
    """Frames, shelves and books on a wall."""
    size = picture.shape[0]
    for _ in range(count):
        x, y, w, h = rng.uniform(-0.1, 0.9), rng.uniform(0, lowest), rng.uniform(0.08, 0.4), rng.uniform(0.06, 0.35)
        inner, edge = _palette(rng, 1)[0], _palette(rng, 1)[0] * 0.5
        a, b = (int(x * size), int(y * size)), (int((x + w) * size), int((y + h) * size))
        cv2.rectangle(picture, a, b, edge.tolist(), -1)
        m = max(1, size // 48)
        cv2.rectangle(picture, (a[0] + m, a[1] + m), (b[0] - m, b[1] - m), inner.tolist(), -1)


def paint_background(scene: Scene, size: int) -> np.ndarray:
    """sRGB float32 [size, size, 3] in 0..1, the same motif at any size."""
    rng = np.random.default_rng([scene.seed, 13])
    work = 256
    y, x = np.mgrid[0:work, 0:work].astype(np.float32) / work
    colours = _palette(rng, 6)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    picture = np.ones((work, work, 3), np.float32) * colours[0]
    kind = scene.background
    if kind == "gradient":
        picture += (colours[1] - colours[0]) * smooth(0.0, 1.0, along - along.min())[..., None]
    elif kind == "striped":
        wave = np.sin(along * rng.uniform(20, 70))
        picture += (colours[1] - colours[0]) * smooth(-0.2, 0.2, wave)[..., None]
    elif kind in ("blurred", "leafy"):
        cells = (5, 5) if kind == "blurred" else (26, 26)
        tint = np.array([0.5, 1.0, 0.4]) if kind == "leafy" else np.ones(3)
        small = (rng.uniform(0.02, 0.98, (*cells, 3)) * 0.6 + 0.4 * colours[0]) * tint
        picture = cv2.resize(small.astype(np.float32), (work, work), interpolation=cv2.INTER_CUBIC)
    elif kind == "room":
        floor = rng.uniform(0.65, 0.9)
        picture[y > floor] = colours[1]
        _boxes(rng, picture, int(rng.integers(2, 6)), floor - 0.3)
    elif kind == "tiled":
        step = rng.uniform(0.09, 0.25)
        grout = (np.abs((x / step) % 1 - 0.5) > 0.46) | (np.abs((y / step) % 1 - 0.5) > 0.46)
        picture = (
            picture
            * (1 + 0.1 * rng.standard_normal((40, 40))[(y / step).astype(int), (x / step).astype(int)])[..., None]
        )
        picture[grout] = colours[1]
    elif kind == "bokeh":
        picture *= 0.35
        for _ in range(rng.integers(12, 30)):
            place = (int(rng.uniform(0, work)), int(rng.uniform(0, work)))
            layer = picture.copy()
            cv2.circle(layer, place, int(rng.uniform(8, 30)), rng.uniform(0.3, 1, 3).tolist(), -1)
            picture += (layer - picture) * 0.5
    elif kind == "window":
        left, wide = rng.uniform(0, 0.5), rng.uniform(0.3, 0.5)
        inside = (x > left) & (x < left + wide) & (y < rng.uniform(0.5, 0.8))
        picture[inside] = np.clip(colours[1] + 0.45, 0, 1)
        bars = inside & ((np.abs(x - left - wide / 2) < 0.012) | (np.abs(y - 0.3) < 0.012))
        picture[bars] = colours[2] * 0.6
    picture = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), float(rng.choice([1.0, 2.5, 6.0])))
    picture = picture * (1 - rng.uniform(0, 0.35) * np.hypot(x - 0.5, y - 0.5))[..., None]
    return np.clip(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA), 0, 1).astype(np.float32)


def dress(texture: np.ndarray, scene: Scene) -> np.ndarray:
    """The head's atlas with clothes painted on, a new linear float32 array."""
    rng = np.random.default_rng([scene.seed, 14])
    maps = atlas.load_maps()
    x, y = np.abs(maps.torso_x), maps.torso_y
    colour = np.array(COLOURS[scene.clothes], np.float32) / 255 * rng.uniform(0.85, 1.1)
    second = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))], np.float32) / 255
    base = rng.uniform(5.72, 5.86)
    line = {
        "crew": base + 0.10 * smooth(0, 0.6, x),
        "v-neck": base - 0.42 + 0.95 * np.clip(x, 0, 0.5),
        "scoop": base - 0.3 + 0.8 * np.clip(x, 0, 0.6) ** 2,
        "shirt": base - 0.12 + 0.5 * np.clip(x, 0, 0.5),
        "high": np.full_like(x, 6.06),
        "jacket": base - 0.05 + 0.2 * np.clip(x, 0, 0.5),
    }[scene.neckline]
    cloth = smooth(0.0, 0.02, line - y)
    fabric = np.ones((*x.shape, 3), np.float32) * colour
    pattern = rng.random()
    if pattern < 0.15:
        fabric += (second - colour) * smooth(-0.2, 0.2, np.sin(y * rng.uniform(40, 90)))[..., None]
    elif pattern < 0.25:
        fabric += (second - colour) * smooth(-0.2, 0.2, np.sin(maps.torso_x * rng.uniform(30, 60)))[..., None]
    if scene.neckline == "jacket":
        fabric += (second - fabric) * smooth(0.02, -0.02, x - 0.5 * (6.0 - y) - 0.05)[..., None] * 0.95
    if scene.neckline == "shirt":
        fabric *= (1 - 0.35 * np.exp(-(((line - y - 0.14) / 0.02) ** 2)))[..., None]
    fabric *= (1 + 0.02 * rng.standard_normal((96, 192)).repeat(2, 0).repeat(4, 1))[: x.shape[0], : x.shape[1], None]
    out = texture.copy()
    torso = out[atlas.HEAD_ROWS : atlas.STRIP]
    torso += (np.clip(fabric, 0, 1) ** np.float32(2.2) - torso) * cloth[..., None]
    return out
