"""The texture that every head is painted into, and the maps that say what lies where on it.

The head is unrolled as a globe, the neck and the shoulders as a picture taken from the front; a strip below holds the
eye, plain swatches and a lock of hair. Paint is defined in the template's coordinates, so that brows, beards and
hairlines follow whatever shape the identity has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from training.data import raster
from training.data.mesh import PARTS, Template, load_template

WIDTH = 768
HEAD_ROWS, TORSO_ROWS, STRIP_ROWS = 384, 192, 64
HEIGHT = HEAD_ROWS + TORSO_ROWS + STRIP_ROWS
STRIP = HEAD_ROWS + TORSO_ROWS  # first row of the strip
CENTRE = np.array([0, 7.2, 0.55], np.float32)
NECK = 6.1  # below this the front projection is used
TORSO_TOP, TORSO_BOTTOM, TORSO_HALF = 6.4, 4.4, 3.0
EYE_CELL = 64
SWATCHES = ("teeth", "tongue", "lashes", "mouth", "glasses")
SWATCH = 16
HAIR_COLUMNS = (256, WIDTH)


def swatch(name: str) -> tuple[slice, slice]:
    """Rows and columns of a plain swatch."""
    left = EYE_CELL + SWATCH * SWATCHES.index(name)
    return slice(STRIP, STRIP + STRIP_ROWS), slice(left, left + SWATCH)


def smooth(low: float | np.ndarray, high: float | np.ndarray, x: np.ndarray) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, smooth between; also falling when high < low."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Maps:
    """What lies at each texel, and where each triangle lies.

    Attributes:
        uv: float32 [T, 3, 2] texel (column, row) of the template's triangle corners; kind: int8 [T] raster materials.
        head: float32 [HEAD_ROWS, WIDTH, 3] template coordinates; masks: name -> float32 [HEAD_ROWS, WIDTH].
        torso_x, torso_y: float32 [TORSO_ROWS, WIDTH] template coordinates.
        openness: float32 [N] share of the surroundings that a vertex sees.
    """

    uv: np.ndarray
    kind: np.ndarray
    head: np.ndarray
    masks: dict[str, np.ndarray]
    torso_x: np.ndarray
    torso_y: np.ndarray
    openness: np.ndarray


def globe(points: np.ndarray) -> np.ndarray:
    """[..., 3] template coordinates to texels of the head's part."""
    d = points - CENTRE
    turn = np.arctan2(d[..., 0], d[..., 2]) / (2 * np.pi) + 0.5
    rise = 0.5 - np.arctan2(d[..., 1], np.hypot(d[..., 0], d[..., 2])) / np.pi
    return np.stack([turn * WIDTH, rise * HEAD_ROWS], -1).astype(np.float32)


def _front(points: np.ndarray) -> np.ndarray:
    column = (points[..., 0] / (2 * TORSO_HALF) + 0.5) * WIDTH
    row = HEAD_ROWS + (TORSO_TOP - points[..., 1]) / (TORSO_TOP - TORSO_BOTTOM) * TORSO_ROWS
    return np.stack([column, np.clip(row, HEAD_ROWS, STRIP - 1)], -1).astype(np.float32)


def _places(template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Texels and materials of all triangles."""
    corners = template.vertices[template.triangles]
    uv = globe(corners)
    seam = np.ptp(uv[..., 0], axis=1) > WIDTH / 2
    uv[seam, :, 0] = np.where(uv[seam, :, 0] < WIDTH / 2, uv[seam, :, 0] + WIDTH, uv[seam, :, 0])
    kind = np.full(len(corners), raster.SKIN, np.int8)
    neck = corners[..., 1].mean(1) < NECK
    uv[neck] = _front(corners[neck])

    def fill(rows: np.ndarray, name: str, material: int) -> None:
        where = swatch(name)
        uv[rows] = (where[1].start + SWATCH / 2, where[0].start + STRIP_ROWS / 2)
        kind[rows] = material

    names = list(PARTS)
    fill(
        (template.masks["inside-mouth"][template.triangles] > 0.5).all(1) & (template.part == 0), "mouth", raster.CLOTH
    )
    fill(template.part == names.index("teeth"), "teeth", raster.TOOTH)
    fill(template.part == names.index("tongue"), "tongue", raster.SKIN)
    fill(template.part == names.index("lashes"), "lashes", raster.CLOTH)
    for side in (1, 2):
        rows = (template.eye[template.triangles] == side).all(1)
        ball = template.vertices[template.eye == side]
        middle, radius = (ball.max(0) + ball.min(0)) / 2, np.ptp(ball[:, 1]) / 2
        place = (corners[rows][..., :2] - middle[:2]) / radius * (EYE_CELL / 2 - 1)
        uv[rows] = np.stack([EYE_CELL / 2 + place[..., 0], STRIP + EYE_CELL / 2 - place[..., 1]], -1)
        kind[rows] = raster.EYE
    return uv, kind


@cache
def load_maps() -> Maps:
    """Computes the maps of the template (a few seconds, once per process)."""
    template = load_template()
    uv, kind = _places(template)
    skin = (kind == raster.SKIN) & (template.part == 0) & (template.vertices[template.triangles][..., 1].mean(1) > 5.9)
    values = np.concatenate([template.vertices, np.stack(list(template.masks.values()), 1)], 1)
    painted = np.zeros((HEAD_ROWS, WIDTH, values.shape[1]), np.float32)
    depth = np.full((HEAD_ROWS, WIDTH), -1e9, np.float32)
    radius = np.linalg.norm(template.vertices - CENTRE, axis=1).astype(np.float32)
    places = globe(template.vertices[template.triangles[skin]])
    seam = np.ptp(places[..., 0], axis=1) > WIDTH / 2
    places[seam, :, 0] = np.where(places[seam, :, 0] < WIDTH / 2, places[seam, :, 0] + WIDTH, places[seam, :, 0])
    raster.paint_map(places, radius, template.triangles[skin], values, painted, depth)
    rows, columns = np.mgrid[0:TORSO_ROWS, 0:WIDTH].astype(np.float32)
    openness = raster.ambient_openness(template.vertices, template.triangles[template.part == 0])
    openness[template.of_part("eyes")] = 0.8
    openness[template.of_part("lashes")] = 0.5
    teeth = np.concatenate([template.of_part("teeth"), template.of_part("tongue")])
    openness[teeth] = smooth(1.0, 1.5, template.vertices[teeth, 2]) * 0.75 + 0.05
    inside = template.masks["inside-mouth"] > 0.5
    openness[inside] = np.minimum(openness[inside], 0.1)
    lips = template.masks["lips"] > 0.3
    openness[lips] = np.maximum(openness[lips], 0.5)
    return Maps(
        uv=uv,
        kind=kind,
        head=painted[..., :3],
        masks={name: painted[..., 3 + i] for i, name in enumerate(template.masks)},
        torso_x=((columns + 0.5) / WIDTH - 0.5) * 2 * TORSO_HALF,
        torso_y=TORSO_TOP - (rows + 0.5) / TORSO_ROWS * (TORSO_TOP - TORSO_BOTTOM),
        openness=(0.25 + 0.75 * openness).astype(np.float32),
    )
