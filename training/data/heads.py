"""Identities: a shape, a surface, hair, glasses; all drawn from one seed. And how an identity is posed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from avatar_rt.models.motion import ARKIT_NAMES, GAZE, ROTATION
from training.data import atlas, hair, paint
from training.data.atlas import smooth
from training.data.mesh import SHAPES, Template, load_template
from training.data.raster import vertex_normals

SPREAD = {"eye": 0.5, "nose": 0.68, "mouth": 0.5, "chin": 0.6, "cheek": 0.6, "forehead": 0.5, "head": 0.33, "ear": 0.5,
          "eyebrows": 0.45, "asym": 0.12}  # fmt: skip
"""How far detail targets of a group go, as a standard deviation; 1 is as far as MakeHuman's sliders reach."""

CALM = (
    "trans",
    "head-scale-vert",
    "angle",
    "jaw-drop",
    "push",
    "philtrum-volume",
)  # targets that soon look wrong: half the spread
_OPPOSITES = (("decr", "incr"), ("in", "out"), ("down", "up"), ("backward", "forward"), ("concave", "convex"),
              ("compress", "uncompress"))  # fmt: skip


@cache
def detail_pairs() -> tuple[tuple[str, np.ndarray, np.ndarray], ...]:
    """(name, towards minus, towards plus), displacements [N, 3]; both sides of the face together."""
    both: dict[str, np.ndarray] = {}
    for name, move in load_template().details.items():
        if name in SHAPES or name.startswith("head-age"):
            continue
        merged = name if name.startswith("asym") else re.sub(r"^[lr]-", "", name)
        both[merged] = both.get(merged, 0) + move
    out, done = [], set()
    for name, move in both.items():
        stem, _, ending = name.rpartition("-")
        for minus, plus in _OPPOSITES:
            if ending in (minus, plus) and f"{stem}-{minus}" in both and f"{stem}-{plus}" in both and stem not in done:
                out.append((stem, both[f"{stem}-{minus}"], both[f"{stem}-{plus}"]))
                done.add(stem)
        if stem not in done:
            out.append((name, np.zeros_like(move), move))
    return tuple(out)


def _shape(rng: np.random.Generator, sex: str, age: float, ethnicity: np.ndarray) -> np.ndarray:
    """Vertices of a neutral face, [N, 3]."""
    template = load_template()
    out = template.vertices.astype(np.float32).copy()
    weight = rng.beta(1.6, 1.6)
    for name, share in (("young", 1 - age), ("old", age)):
        thin, fat = max(0.0, 1 - 2 * weight), max(0.0, 2 * weight - 1)
        for level, part in (("min", thin), ("max", fat), ("average", 1 - thin - fat)):
            out += template.macros[f"universal-{sex}-{name}-averagemuscle-{level}weight"] * np.float32(share * part)
        for kind, part in zip(("caucasian", "asian", "african"), ethnicity, strict=True):
            out += template.macros[f"{kind}-{sex}-{name}"] * np.float32(share * part)
    out += template.details[str(rng.choice(SHAPES))] * np.float32(rng.uniform(0.2, 0.9))
    if "head-age-incr" in template.details:
        out += template.details["head-age-incr"] * np.float32(0.7 * age)
    for name, minus, plus in detail_pairs():
        spread = SPREAD[next(k for k in SPREAD if name.startswith(k))]
        if any(word in name for word in CALM):
            spread *= 0.5
        amount = float(np.clip(rng.normal(0, spread), -1.1, 1.1))
        out += (plus if amount > 0 else minus) * np.float32(abs(amount))
    return out


@dataclass(frozen=True)
class Landmarks:
    """Indices of the template that measures are taken from."""

    face: np.ndarray  # hairline to chin, cheek to cheek: the face box
    upper_lip: np.ndarray  # inner edge, [3]
    lower_lip: np.ndarray
    brow: np.ndarray


@cache
def landmarks() -> Landmarks:
    """Found on the template by where they lie and by what opening the jaw does to them."""
    template = load_template()
    v, skin = template.vertices, template.of_part("skin")
    face = skin[(template.masks["face"][skin] > 0.5) & (v[skin, 1] < 7.98)]
    opened = template.expressions[ARKIT_NAMES.index("jawOpen")][:, 1]
    front = skin[(v[skin, 2] > 1.47) & (np.abs(v[skin, 1] - 6.607) < 0.06)]
    upper, lower = [], []
    for x in (-0.08, 0.0, 0.08):
        near = front[np.abs(v[front, 0] - x) < 0.03]
        still, moved = near[opened[near] > -0.05], near[opened[near] < -0.2]
        upper.append(still[v[still, 1].argmin()])
        lower.append(moved[v[moved, 1].argmax()])
    brow = skin[(np.abs(v[skin, 1] - 7.47) < 0.06) & (v[skin, 2] > 1.1)]
    return Landmarks(face, np.array(upper), np.array(lower), brow)


@dataclass(frozen=True)
class Head:
    """One identity, ready to be posed. Vertices are those of the template followed by the extras'.

    Attributes:
        vertices: float32 [N + n, 3], neutral, hair standing off.
        triangles, uv, kind, openness: of all, as raster.draw takes them.
        follow: float32 [N + n], how much of the head's turn a vertex follows (shoulders 0).
        texture: float32, the atlas without clothes.
        pivot: where the head turns, [3]. chin, top: heights of the face box.
        gap: lip opening of the neutral face, in the mesh's units.
        attributes: words for captions: sex, age, hair, eyes, beard, glasses and so on.
    """

    seed: int
    vertices: np.ndarray
    triangles: np.ndarray
    uv: np.ndarray
    kind: np.ndarray
    openness: np.ndarray
    follow: np.ndarray
    texture: np.ndarray
    pivot: np.ndarray
    chin: float
    top: float
    gap: float
    attributes: dict[str, object]

    @property
    def face_height(self) -> float:
        return self.top - self.chin


def _extras(rng: np.random.Generator, haired: np.ndarray, shaped: np.ndarray, style: hair.HairStyle,
            glasses: hair.Glasses | None, template: Template) -> list[hair.Extra]:  # fmt: skip
    """Hanging hair, buns and glasses, placed on the shaped head."""
    out = []
    skin = template.of_part("skin")
    shift = shaped[skin].mean(0) - template.vertices[skin].mean(0)
    curtain = hair.hanging(haired[skin] - [0, shift[1], 0], style, rng)
    if curtain is not None:
        curtain.vertices[:, 1] += shift[1]
        out.append(curtain)
    crown = skin[template.vertices[skin, 1] > 7.9]
    moved = shaped[crown].mean(0) - template.vertices[crown].mean(0)
    out += [hair.bun(place, moved) for place in style.buns]
    if glasses is not None:
        eyes = np.stack([shaped[template.eye == s].mean(0) for s in (1, 2)])
        front = float(max(shaped[landmarks().brow][:, 2].max(), shaped[template.of_part("lashes"), 2].max())) + 0.05
        plain = skin[template.masks["ears"][skin] < 0.05]
        beside = shaped[plain][np.abs(shaped[plain, 1] - eyes[0, 1]) < 0.12]
        hooks = np.array(
            [[s * np.abs(beside[:, 0]).max() * 1.02, eyes[0, 1] + 0.05, eyes[0, 2] - 0.65] for s in (1, -1)]
        )
        out.append(hair.glasses_mesh(glasses, eyes, front, hooks))
    return out


def make_head(seed: int) -> Head:
    """The identity of a seed: the same arrays whenever it is asked for."""
    rng = np.random.default_rng([seed, 11])
    template, maps, marks = load_template(), atlas.load_maps(), landmarks()
    sex = str(rng.choice(["female", "male"]))
    age = float(rng.beta(1.1, 1.7))
    ethnicity = rng.dirichlet([0.45] * 3)
    shaped = _shape(rng, sex, age, ethnicity)
    style, looks = hair.draw_style(rng, sex, age), paint.draw_looks(rng, sex, age, ethnicity)
    glasses = hair.draw_glasses(rng) if rng.random() < 0.28 else None
    frames = rng.choice(np.array([[0.03] * 3, [0.03] * 3, [0.25, 0.13, 0.06], [0.7, 0.6, 0.35], [0.5, 0.05, 0.08],
                                  [0.08, 0.15, 0.45], [0.75] * 3]))  # fmt: skip
    gap = float((shaped[marks.upper_lip] - shaped[marks.lower_lip])[:, 1].mean())
    skin = template.part == 0
    normals = vertex_normals(shaped, np.ascontiguousarray(template.triangles[skin]))
    height = hair.stand_off(template.vertices, template.masks["ears"], style, rng)
    if looks.beard in ("full", "goatee"):
        full = paint.beard_mask(template.vertices, looks.beard) * (1 - smooth(0.1, 0.4, template.masks["lips"]))
        height += (full * rng.uniform(0.02, 0.12)).astype(np.float32)
    height *= template.masks["inside-mouth"] < 0.3
    out = shaped + normals * height[:, None]
    extras = _extras(rng, out, shaped, style, glasses, template)
    offsets = np.cumsum([len(out)] + [len(e.vertices) for e in extras])
    face = shaped[marks.face]
    base = face[:, 1].min()
    follow = smooth(base - 0.45, base + 0.15, shaped[:, 1])
    attributes = {
        "sex": sex, "age": age, "ethnicity": ethnicity.round(3).tolist(), "hair": style.name,
        "hair_colour": looks.hair_name,
        "eyes": looks.eye_name, "beard": looks.beard, "glasses": glasses.name if glasses else None,
        "skin": round(looks.skin_depth, 3), "freckles": looks.freckles > 0,
    }  # fmt: skip
    return Head(
        seed=seed,
        vertices=np.concatenate([out] + [e.vertices for e in extras]).astype(np.float32),
        triangles=np.concatenate([template.triangles] + [e.triangles + o for e, o in zip(extras, offsets)]),
        uv=np.concatenate([maps.uv] + [e.uv for e in extras]),
        kind=np.concatenate([maps.kind] + [np.full(len(e.triangles), e.kind, np.int8) for e in extras]),
        openness=np.concatenate([maps.openness] + [np.full(len(e.vertices), 0.85, np.float32) for e in extras]),
        follow=np.concatenate([follow] + [e.follow for e in extras]).astype(np.float32),
        texture=paint.paint_head(looks, style, frames),
        pivot=np.array([0, base + 0.15, shaped[neck_ring(), 2].mean()], np.float32),
        chin=float(base), top=float(face[:, 1].max()), gap=gap, attributes=attributes,
    )  # fmt: skip


@cache
def neck_ring() -> np.ndarray:
    """Vertices round the neck below the jaw, whose middle the head turns about."""
    v, skin = load_template().vertices, load_template().of_part("skin")
    return skin[(v[skin, 1] > 5.9) & (v[skin, 1] < 6.2) & (v[skin, 2] < 1.0)]


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """[3, 3]. Positive yaw turns to the picture's right, pitch looks down, roll tilts anticlockwise in the picture."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (tilt @ nod @ turn).astype(np.float32)


@cache
def _flat_expressions() -> np.ndarray:
    """Expressions with the eyeballs left out: those are turned exactly. float32 [52, 3N]."""
    template = load_template()
    moves = template.expressions * (template.eye == 0)[None, :, None]
    return np.ascontiguousarray(moves.reshape(len(ARKIT_NAMES), -1), dtype=np.float32)


def express(head: Head, motion: np.ndarray) -> np.ndarray:
    """The face of one motion frame [62], the head not yet turned: float32 [N + n, 3]."""
    template, out = load_template(), head.vertices.copy()
    used = np.flatnonzero(np.abs(motion[:52]) > 1e-4)
    count = len(template.vertices)
    out[:count] += (motion[used].astype(np.float32) @ _flat_expressions()[used]).reshape(-1, 3)
    for side, (right, down) in zip((1, 2), motion[GAZE].reshape(2, 2), strict=True):
        ball = template.eye == side
        middle = (out[:count][ball].max(0) + out[:count][ball].min(0)) / 2
        out[:count][ball] = (out[:count][ball] - middle) @ rotation(right, down, 0).T + middle
    return out


def turn(head: Head, vertices: np.ndarray, motion: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Turns and moves the head on its shoulders; ``shift`` [3] in the mesh's units."""
    turned = (vertices - head.pivot) @ rotation(*motion[ROTATION]).T + head.pivot
    follow = head.follow[:, None]
    return vertices + (turned - vertices) * follow + shift * (0.35 + 0.65 * follow)


def lip_opening(head: Head, vertices: np.ndarray) -> float:
    """Distance of the inner lips over the face's height, of the unturned face; 0 closed."""
    marks = landmarks()
    gap = (vertices[marks.upper_lip] - vertices[marks.lower_lip])[:, 1].mean() - head.gap
    return float(max(gap, 0.0) / head.face_height)
