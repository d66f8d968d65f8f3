"""Hair and glasses: where hair grows, how far it stands off, and the meshes that hang beside the face."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from training.data import raster
from training.data.atlas import HAIR_COLUMNS, STRIP, STRIP_ROWS, smooth, swatch

#                 height: how far forward (z) hair grows there
_LINE_Y = np.array([6.35, 6.6, 6.9, 7.15, 7.4, 7.65, 7.85, 8.0, 8.1, 8.5])
_LINE_Z = np.array([-0.05, 0.12, 0.36, 0.62, 0.86, 1.0, 1.2, 1.38, 1.62, 3.0])


@dataclass(frozen=True)
class HairStyle:
    """An outline. Lengths in the mesh's units (a face is about 1.8 high).

    Attributes:
        thickness: how far the shell stands off; top, front: extra share of it on the crown and above the forehead.
        rise: hairline up (receding) or down; temples: recession at the temples; fringe: lower edge over the forehead.
        curl: bumps; crown_only: shaved sides; horseshoe: bald on top; hang: lower end of hanging hair, or None.
        open_angle: half the angle left open for the face, radians; volume: how far hanging hair stands off.
        part: side of the parting, -1, 0, 1; buns: centres and radii.
    """

    name: str
    thickness: float
    top: float = 0.0
    front: float = 0.0
    rise: float = 0.0
    temples: float = 0.0
    fringe: float | None = None
    curl: float = 0.0
    crown_only: bool = False
    horseshoe: bool = False
    hang: float | None = None
    open_angle: float = 1.3
    volume: float = 0.08
    part: int = 0
    buns: tuple[tuple[float, float, float, float], ...] = ()


STYLES = {
    "bald": HairStyle("bald", 0),
    "balding": HairStyle("balding", 0.04, horseshoe=True),
    "cropped": HairStyle("cropped", 0.025),
    "short": HairStyle("short", 0.10, top=0.4),
    "swept": HairStyle("swept", 0.12, top=0.8, front=1.2),
    "parted": HairStyle("parted", 0.15, top=0.5, part=1),
    "fringed": HairStyle("fringed", 0.13, top=0.5, fringe=7.68),
    "undercut": HairStyle("undercut", 0.16, top=0.6, front=0.6, crown_only=True),
    "curly": HairStyle("curly", 0.24, top=0.3, curl=0.5),
    "afro": HairStyle("afro", 0.46, top=0.15, curl=0.2),
    "bob": HairStyle("bob", 0.14, top=0.3, hang=6.4, volume=0.12, part=1),
    "fringed bob": HairStyle("fringed bob", 0.14, top=0.3, fringe=7.66, hang=6.45, open_angle=1.15, volume=0.1),
    "long": HairStyle("long", 0.12, top=0.3, hang=4.9, volume=0.06, part=1),
    "long fringed": HairStyle("long fringed", 0.12, top=0.3, fringe=7.66, hang=4.9, open_angle=1.1),
    "long wavy": HairStyle("long wavy", 0.2, top=0.3, curl=0.3, hang=5.0, open_angle=1.2, volume=0.2),
    "tied back": HairStyle("tied back", 0.06),
    "bun": HairStyle("bun", 0.07, buns=((0, 8.62, 0.55, 0.36),)),
    "pigtails": HairStyle("pigtails", 0.08, buns=((0.95, 7.75, 0.3, 0.3), (-0.95, 7.75, 0.3, 0.3))),
}
FEMALE = {
    "long": 5, "long fringed": 3, "long wavy": 4, "bob": 4, "fringed bob": 3, "tied back": 3, "bun": 3,
    "pigtails": 1, "curly": 2, "afro": 2, "short": 2, "fringed": 1, "parted": 1, "cropped": 0.5, "bald": 0.3,
}  # fmt: skip
MALE = {
    "short": 4, "swept": 3, "parted": 3, "fringed": 2, "undercut": 3, "curly": 2.5, "afro": 2, "cropped": 3,
    "bald": 2.5, "balding": 2.5, "long": 1, "long wavy": 0.7, "tied back": 0.7,
}  # fmt: skip


def draw_style(rng: np.random.Generator, sex: str, age: float) -> HairStyle:
    """A hair style with its own proportions."""
    odds = dict(FEMALE if sex == "female" else MALE)
    if sex == "male":
        odds["balding"] *= 0.2 + 2.5 * age
    weights = np.array(list(odds.values()))
    style = STYLES[str(rng.choice(list(odds), p=weights / weights.sum()))]
    recede = age * rng.uniform(0, 0.14) if sex == "male" else 0.0
    return replace(
        style,
        thickness=style.thickness * rng.uniform(0.75, 1.3),
        top=style.top * rng.uniform(0.4, 1.6),
        front=style.front * rng.uniform(0.5, 1.4),
        rise=float(rng.normal(0, 0.045)) + recede,
        temples=float(rng.uniform(0, 0.12)) + recede,
        fringe=None if style.fringe is None else style.fringe + rng.uniform(-0.07, 0.14),
        hang=None if style.hang is None else style.hang + rng.uniform(-0.1, 0.35),
        open_angle=style.open_angle + rng.uniform(-0.15, 0.2),
        volume=style.volume * rng.uniform(0.5, 1.7),
        part=style.part * int(rng.choice([-1, 1])),
    )


def growth(points: np.ndarray, style: HairStyle) -> np.ndarray:
    """How far inside the hair's outline a template point lies, [...]; above 0 is hair."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    front = smooth(7.3, 7.8, y)
    line = np.interp(y - style.rise * front, _LINE_Y, _LINE_Z)
    line = line - style.temples * np.exp(-(((np.abs(x) - 0.48) / 0.16) ** 2)) * front * 2
    if style.part:
        line = line + 0.06 * style.part * x * front
    inside = np.where(y < _LINE_Y[0], -1.0, line - z)
    if style.fringe is not None:
        edge = style.fringe + 0.10 * np.abs(x) ** 2
        inside = np.maximum(inside, np.where((z > 0.6) & (y > 7.2), (y - edge) * 1.5, -1.0))
    if style.horseshoe:
        inside = np.minimum(inside, (7.75 - y) * 1.2)
    if style.crown_only:
        inside = np.minimum(inside, (y - 7.88) * 1.2)
    return inside if style.thickness > 0 else np.full_like(inside, -1.0)


def stand_off(points: np.ndarray, ears: np.ndarray, style: HairStyle, rng: np.random.Generator) -> np.ndarray:
    """Outward displacement of template vertices, float32 [N]."""
    x, y, z = points.T
    rise = smooth(0.0, 0.28, growth(points, style)) * (1 - smooth(0.1, 0.4, ears))
    amount = 1 + style.top * smooth(7.9, 8.4, y) + style.front * smooth(7.9, 8.1, y) * smooth(0.7, 1.2, z)
    if style.part:
        amount = amount * (1 - 0.55 * np.exp(-(((x - 0.3 * style.part) / 0.08) ** 2)) * smooth(0.2, 0.6, z))
    if style.curl:
        bumps = np.zeros(len(points))
        for _ in range(6):
            wave = rng.normal(0, 6, 3)
            bumps += np.sin(points @ wave + rng.uniform(0, 6.3))
        amount = amount * (1 + style.curl * bumps / 4)
    return (style.thickness * rise * np.clip(amount, 0.1, None)).astype(np.float32)


@dataclass(frozen=True)
class Extra:
    """A rigid mesh on the head: vertices [n, 3], triangles [t, 3], uv [t, 3, 2] texels, material, follow [n].

    ``follow`` is how much of the head's turn a vertex follows.
    """

    vertices: np.ndarray
    triangles: np.ndarray
    uv: np.ndarray
    kind: int
    follow: np.ndarray


def _grid(rows: int, columns: int) -> np.ndarray:
    """Triangles of a grid of vertices, int32 [2 (rows-1) (columns-1), 3]."""
    i = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = i[:-1, :-1].ravel(), i[:-1, 1:].ravel(), i[1:, :-1].ravel(), i[1:, 1:].ravel()
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)]).astype(np.int32)


def _hair_uv(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    column = HAIR_COLUMNS[0] + u * (HAIR_COLUMNS[1] - HAIR_COLUMNS[0] - 1)
    return np.stack([column, STRIP + np.clip(v, 0, 1) * (STRIP_ROWS - 1)], -1).astype(np.float32)


def hanging(head: np.ndarray, style: HairStyle, rng: np.random.Generator) -> Extra | None:
    """Hair that falls beside and behind the face, laid round the outline of ``head`` [N, 3] (hair included)."""
    if style.hang is None:
        return None
    columns, rows = 40, 16
    turn = np.linspace(style.open_angle, 2 * np.pi - style.open_angle, columns)
    levels = np.linspace(7.95, style.hang, rows)
    axis = np.array([0, 0.45])
    upper = head[head[:, 1] > 6.9]
    angle = np.arctan2(upper[:, 0] - axis[0], upper[:, 2] - axis[1]) % (2 * np.pi)
    reach = np.hypot(upper[:, 0] - axis[0], upper[:, 2] - axis[1])
    vertices = np.zeros((rows, columns, 3), np.float32)
    widest = np.zeros(columns)
    phase = rng.uniform(0, 6.3, 3)
    for r, level in enumerate(levels):
        for c, t in enumerate(turn):
            near = (np.abs((angle - t + np.pi) % (2 * np.pi) - np.pi) < 0.14) & (np.abs(upper[:, 1] - level) < 0.16)
            if near.any():
                widest[c] = max(widest[c], reach[near].max())
        fall = smooth(7.9, 7.2, level) * style.volume
        sway = style.curl * 0.12 * np.sin(5 * turn + 5 * level + phase[0]) + 0.03 * np.sin(9 * turn + phase[1])
        radius = widest * (0.97 + 0.03 * smooth(7.9, 7.5, level)) + fall + sway * smooth(7.6, 6.8, level)
        vertices[r] = np.stack([radius * np.sin(turn), np.full(columns, level), axis[1] + radius * np.cos(turn)], -1)
    triangles = _grid(rows, columns)
    v, u = np.mgrid[0:rows, 0:columns].astype(np.float32)
    uv = _hair_uv((u / (columns - 1)).ravel()[triangles], (v / (rows - 1)).ravel()[triangles])
    flat = vertices.reshape(-1, 3)
    return Extra(flat, triangles, uv, raster.HAIR, (0.35 + 0.65 * smooth(5.4, 6.8, flat[:, 1])).astype(np.float32))


def bun(place: tuple[float, float, float, float], shift: np.ndarray) -> Extra:
    """A ball of hair; ``shift`` [3] moves it from the template to the identity."""
    rows, columns = 9, 14
    v, u = np.mgrid[0:rows, 0:columns].astype(np.float32)
    up, round_ = np.pi * v / (rows - 1), 2 * np.pi * u / (columns - 1)
    ball = np.stack([np.sin(up) * np.sin(round_), np.cos(up), np.sin(up) * np.cos(round_)], -1) * place[3]
    triangles = _grid(rows, columns)
    uv = _hair_uv((u / (columns - 1)).ravel()[triangles], (v / (rows - 1)).ravel()[triangles])
    vertices = (ball.reshape(-1, 3) + np.array(place[:3]) + shift).astype(np.float32)
    return Extra(vertices, triangles, uv, raster.HAIR, np.ones(len(vertices), np.float32))


@dataclass(frozen=True)
class Glasses:
    """Frames: half width and height of a lens, squareness (2 round, 5 square), droop of the outer lower corner, rim."""

    width: float
    height: float
    power: float
    droop: float
    rim: float
    name: str


def draw_glasses(rng: np.random.Generator) -> Glasses:
    name = str(rng.choice(["round", "square", "wide", "aviator"]))
    width, height, power, droop = {
        "round": (0.22, 0.21, 2.0, 0.0), "square": (0.24, 0.18, 5.0, 0.0), "wide": (0.26, 0.13, 3.5, 0.0),
        "aviator": (0.25, 0.22, 2.6, 0.06),
    }[name]  # fmt: skip
    width, height = width * rng.uniform(0.92, 1.1), height * rng.uniform(0.9, 1.15)
    return Glasses(width, height, power, droop, rng.uniform(0.025, 0.065), name)


def glasses_mesh(glasses: Glasses, eyes: np.ndarray, front: float, temples: np.ndarray) -> Extra:
    """Frames before the eyes ([2, 3], left then right) at depth ``front``, hooked over ``temples`` [2, 3]."""
    steps = 28
    t = np.linspace(0, 2 * np.pi, steps)
    vertices: list[np.ndarray] = []
    triangles: list[np.ndarray] = []

    def add(points: np.ndarray, faces: np.ndarray) -> None:
        triangles.append(faces + sum(len(v) for v in vertices))
        vertices.append(points.reshape(-1, 3))

    for side, eye, hook in zip((1, -1), eyes, temples, strict=True):
        c, s = np.cos(t), np.sin(t)
        x = np.sign(c) * np.abs(c) ** (2 / glasses.power)
        y = np.sign(s) * np.abs(s) ** (2 / glasses.power)
        y = y - glasses.droop / glasses.height * np.clip(-y, 0, 1) * (0.6 + 0.4 * x)
        outline = np.stack([x * glasses.width, y * glasses.height], -1)
        rings = []
        for grow, depth in ((0.0, 0.0), (1.0, 0.03), (1.0, -0.05)):
            size = 1 + grow * glasses.rim / np.linalg.norm(outline, axis=1, keepdims=True)
            ring = outline * size
            bend = front + depth - 0.25 * (np.abs(eye[0] + side * ring[:, 0]) / 0.6) ** 2 * 0.4
            rings.append(np.stack([eye[0] + side * ring[:, 0], eye[1] - 0.02 + ring[:, 1], bend], -1))
        add(np.stack(rings), _grid(3, steps))
        edge = np.array([eye[0] + side * (glasses.width + glasses.rim), eye[1] + 0.05, front - 0.12])
        arm = glasses.rim * 0.8
        corners = np.stack([edge + [0, arm, 0], edge - [0, arm, 0], hook + [0, arm, 0], hook - [0, arm, 0]])
        add(corners, np.array([[0, 1, 2], [2, 1, 3]], np.int32))
    inner = np.array([eyes[0][0] - glasses.width, eyes[1][0] + glasses.width])
    y, arm = eyes[:, 1].mean() + 0.06, glasses.rim * 0.7
    bridge = np.array([[inner[0], y + arm, front], [inner[0], y - arm, front], [inner[1], y + arm, front],
                       [inner[1], y - arm, front]])  # fmt: skip
    add(bridge, np.array([[0, 1, 2], [2, 1, 3]], np.int32))
    all_triangles, points = np.concatenate(triangles).astype(np.int32), np.concatenate(vertices).astype(np.float32)
    where = swatch("glasses")
    uv = np.full((len(all_triangles), 3, 2), (where[1].start + 8, where[0].start + 30), np.float32)
    return Extra(points, all_triangles, uv, raster.GLOSS, np.ones(len(points), np.float32))
