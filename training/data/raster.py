"""A z-buffer rasteriser in numba: textured, lit per pixel, one core, hundreds of small pictures a second."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

SKIN, EYE, TOOTH, HAIR, CLOTH, GLOSS = range(6)
"""Materials. They differ in how far light wraps round an edge, in shine, and in whether both sides are seen."""

#                     wrap, shine, tight, two-sided
_MATERIALS = np.array(
    [
        [0.30, 0.10, 0.0, 0.0],
        [0.45, 0.55, 1.0, 0.0],
        [0.60, 0.25, 1.0, 0.0],
        [0.20, 0.22, 0.0, 1.0],
        [0.15, 0.00, 0.0, 1.0],
        [0.20, 0.50, 1.0, 1.0],
    ],
    np.float32,
)


@dataclass(frozen=True)
class Light:
    """Light on a scene, linear RGB. ``direction`` [3] points to the key light, unit length."""

    direction: np.ndarray
    key: np.ndarray
    above: np.ndarray
    below: np.ndarray
    rim: np.ndarray

    def packed(self) -> np.ndarray:
        return np.stack([self.direction, self.key, self.above, self.below, self.rim]).astype(np.float32)


@numba.njit(fastmath=True, cache=True)
def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Area-weighted unit normals, float32 [N, 3]."""
    normals = np.zeros_like(vertices)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x1, y1, z1 = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        x2, y2, z2 = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(normals.shape[0]):
        length = np.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-9
        for k in range(3):
            normals[i, k] /= length
    return normals


@numba.njit(fastmath=True, cache=True)
def _shade(out, albedo, nx, ny, nz, open_, material, light):
    wrap, shine = material[0], material[1]
    if nz < 0 and material[3] > 0:
        nx, ny, nz = -nx, -ny, -nz
    lx, ly, lz = light[0, 0], light[0, 1], light[0, 2]
    diffuse = max(np.float32(0), (nx * lx + ny * ly + nz * lz + wrap) / (1 + wrap)) * (0.45 + 0.55 * open_)
    hz = lz + 1
    half = max(np.float32(0), (nx * lx + ny * ly + nz * hz) / np.sqrt(lx * lx + ly * ly + hz * hz))
    s = half * half
    s = s * s
    s = s * s
    if material[2] > 0:
        s = s * s
        s = s * s * s
    edge = 1 - abs(nz)
    edge = edge * edge * edge
    up = 0.5 + 0.5 * ny
    for k in range(3):
        ambient = light[3, k] + (light[2, k] - light[3, k]) * up
        out[k] = albedo[k] * (ambient * open_ + light[1, k] * diffuse + light[4, k] * edge) + shine * s * light[1, k]


@numba.njit(fastmath=True, cache=True)
def draw(screen, normals, openness, triangles, uv, kind, texture, materials, light, picture, depth):
    """Draws triangles into ``picture`` and ``depth``.

    Args:
        screen: float32 [N, 3], x and y in pixels, y down, and the distance from the camera.
        normals: float32 [N, 3], camera space; openness: float32 [N], the share of the surroundings a point sees.
        triangles: int32 [T, 3]; uv: float32 [T, 3, 2] in texture pixels (column, row); kind: int8 [T] materials.
        texture: float32 [h, w, 3], linear; light: float32 [5, 3] of Light.packed.
        picture: float32 [S, S, 3], linear; depth: float32 [S, S], 1e9 where nothing has been drawn.
    """
    size_y, size_x = depth.shape
    rows, columns = texture.shape[0], texture.shape[1]
    colour = np.empty(3, np.float32)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0, x1, y1, x2, y2 = screen[a, 0], screen[a, 1], screen[b, 0], screen[b, 1], screen[c, 0], screen[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        material = materials[kind[t]]
        if area == 0 or (area > 0 and material[3] == 0):
            continue
        xa, xb = max(0, int(np.ceil(min(x0, x1, x2) - 0.5))), min(size_x - 1, int(np.floor(max(x0, x1, x2) - 0.5)))
        ya, yb = max(0, int(np.ceil(min(y0, y1, y2) - 0.5))), min(size_y - 1, int(np.floor(max(y0, y1, y2) - 0.5)))
        inverse = 1 / area
        for y in range(ya, yb + 1):
            for x in range(xa, xb + 1):
                px, py = x + np.float32(0.5), y + np.float32(0.5)
                w0 = ((x1 - px) * (y2 - py) - (x2 - px) * (y1 - py)) * inverse
                w1 = ((x2 - px) * (y0 - py) - (x0 - px) * (y2 - py)) * inverse
                w2 = 1 - w0 - w1
                if w0 < 0 or w1 < 0 or w2 < 0:
                    continue
                z = w0 * screen[a, 2] + w1 * screen[b, 2] + w2 * screen[c, 2]
                if z >= depth[y, x]:
                    continue
                depth[y, x] = z
                u = int(w0 * uv[t, 0, 0] + w1 * uv[t, 1, 0] + w2 * uv[t, 2, 0])
                v = int(w0 * uv[t, 0, 1] + w1 * uv[t, 1, 1] + w2 * uv[t, 2, 1])
                _shade(
                    colour,
                    texture[min(max(v, 0), rows - 1), min(max(u, 0), columns - 1)],
                    w0 * normals[a, 0] + w1 * normals[b, 0] + w2 * normals[c, 0],
                    w0 * normals[a, 1] + w1 * normals[b, 1] + w2 * normals[c, 1],
                    w0 * normals[a, 2] + w1 * normals[b, 2] + w2 * normals[c, 2],
                    w0 * openness[a] + w1 * openness[b] + w2 * openness[c],
                    material,
                    light,
                )
                for k in range(3):
                    picture[y, x, k] = colour[k]


def materials() -> np.ndarray:
    """float32 [6, 4], the table that ``draw`` takes."""
    return _MATERIALS


@numba.njit(fastmath=True, cache=True)
def paint_map(places, radius, triangles, values, out, depth):
    """Spreads vertex values over a texture: the outermost surface at each texel wins.

    Args:
        places: float32 [T, 3, 2] texel coordinates of the corners; radius, values: float32 [N] and [N, C].
        out: float32 [h, w, C]; depth: float32 [h, w], at first -1e9.
    """
    for t in range(triangles.shape[0]):
        x0, y0, x1, y1, x2, y2 = (places[t, 0, 0], places[t, 0, 1], places[t, 1, 0], places[t, 1, 1],
                                  places[t, 2, 0], places[t, 2, 1])  # fmt: skip
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area == 0:
            continue
        for y in range(max(0, int(min(y0, y1, y2))), min(out.shape[0] - 1, int(max(y0, y1, y2)) + 1) + 1):
            for x in range(max(0, int(min(x0, x1, x2))), min(out.shape[1] - 1, int(max(x0, x1, x2)) + 1) + 1):
                w0 = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
                w1 = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
                w2 = 1 - w0 - w1
                if w0 < -0.01 or w1 < -0.01 or w2 < -0.01:
                    continue
                a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                r = w0 * radius[a] + w1 * radius[b] + w2 * radius[c]
                if r > depth[y, x]:
                    depth[y, x] = r
                    for k in range(out.shape[2]):
                        out[y, x, k] = w0 * values[a, k] + w1 * values[b, k] + w2 * values[c, k]


@numba.njit(fastmath=True, cache=True)
def _depth_only(points, triangles, depth):
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0, x1, y1, x2, y2 = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area == 0:
            continue
        for y in range(max(0, int(min(y0, y1, y2))), min(depth.shape[0] - 1, int(max(y0, y1, y2)) + 1) + 1):
            for x in range(max(0, int(min(x0, x1, x2))), min(depth.shape[1] - 1, int(max(x0, x1, x2)) + 1) + 1):
                w0 = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
                w1 = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
                w2 = 1 - w0 - w1
                if w0 >= 0 and w1 >= 0 and w2 >= 0:
                    z = w0 * points[a, 2] + w1 * points[b, 2] + w2 * points[c, 2]
                    if z > depth[y, x]:
                        depth[y, x] = z


def ambient_openness(vertices: np.ndarray, triangles: np.ndarray, directions: int = 64, size: int = 160) -> np.ndarray:
    """How much of the sphere of directions each vertex sees, float32 [N] in 0..1, by looking from all sides."""
    normals = vertex_normals(vertices, triangles)
    turn = np.arange(directions) * np.pi * (3 - np.sqrt(5))
    height = 1 - 2 * (np.arange(directions) + 0.5) / directions
    ring = np.sqrt(1 - height**2)
    middle = (vertices.max(0) + vertices.min(0)) / 2
    scale = size / 2 / np.linalg.norm(vertices - middle, axis=1).max()
    seen, total = np.zeros(len(vertices)), np.zeros(len(vertices))
    for d in np.stack([ring * np.cos(turn), height, ring * np.sin(turn)], 1):
        side = np.cross(d, [0.3, 0.1, 0.9] if abs(d[1]) > 0.9 else [0, 1, 0])
        side /= np.linalg.norm(side)
        points = ((vertices - middle) @ np.stack([side, np.cross(d, side), d], 1) * scale).astype(np.float32)
        points[:, :2] += size / 2
        depth = np.full((size, size), -1e9, np.float32)
        _depth_only(points, triangles, depth)
        column, row = np.clip(points[:, :2].astype(int), 0, size - 1).T
        facing = np.clip(normals @ d, 0, None)
        seen += facing * (points[:, 2] > depth[row, column] - 0.04 * scale)
        total += facing
    return (seen / np.maximum(total, 1e-6)).astype(np.float32)
