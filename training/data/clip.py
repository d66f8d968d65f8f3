"""One clip: an identity, a scene and a sentence, rendered, with everything that is true of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import cv2
import numpy as np

from avatar_rt.errors import InputError
from avatar_rt.media.face import CROP_DROP, CROP_SIDE
from avatar_rt.models.motion import TRANSLATION
from training.data import raster
from training.data.heads import Head, express, landmarks, lip_opening, make_head, turn
from training.data.perform import Style, draw_style, perform
from training.data.scene import Scene, draw_scene, dress, paint_background
from training.data.speech import Speaker, Utterance, Voice, draw_voice, make_track, phonemes_of_frames

GAMMA = np.float32(2.2)
GARMENTS = {
    "crew": "t-shirt", "v-neck": "v-neck top", "scoop": "scoop-neck top", "shirt": "shirt", "high": "roll-neck jumper",
    "jacket": "jacket",
}  # fmt: skip
PLACES = {
    "plain": "a plain wall", "gradient": "a softly shaded wall", "striped": "a striped wall", "tiled": "a tiled wall",
    "blurred": "a blurred backdrop", "room": "a room", "bokeh": "city lights", "leafy": "leaves", "window": "a window",
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """F frames of S x S pixels. Fields as the corpus stores them (see corpus.py)."""

    frames: np.ndarray
    audio: np.ndarray
    motion: np.ndarray
    phonemes: np.ndarray
    mouth: np.ndarray
    background: np.ndarray
    facebox: np.ndarray
    meta: dict[str, object]


@lru_cache(maxsize=4)
def head_of(identity: int) -> Head:
    return make_head(identity)


def manner_of(identity: int, held_out: bool = False) -> tuple[Style, Voice]:
    """How an identity talks and with which voice; ``held_out`` chooses among voices that training never uses."""
    rng = np.random.default_rng([identity, 21])
    return draw_style(rng), draw_voice(rng, str(head_of(identity).attributes["sex"]), held_out)


def _project(vertices: np.ndarray, camera: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Pixels and distance, float32 [N, 3]; camera is (focal length for size 1, distance, centre x, centre y)."""
    focal, distance, x, y = camera
    out = np.empty_like(vertices)
    out[:, 2] = distance - vertices[:, 2]
    out[:, 0] = size * (0.5 + (vertices[:, 0] - x) * focal / out[:, 2])
    out[:, 1] = size * (0.5 - (vertices[:, 1] - y) * focal / out[:, 2])
    return out


def _aim(head: Head, posed: list[np.ndarray], scene: Scene) -> tuple[float, float, float, float]:
    """The camera that frames the clip as media.face crops a real one: the mean face box, CROP_SIDE box heights."""
    points = np.stack([p[landmarks().face] for p in posed])
    low, high = points.min(1), points.max(1)
    height = float((high - low)[:, 1].mean())
    middle = (low + high).mean(0) / 2
    dx, dy, zoom = scene.camera.frame
    distance = scene.camera.distance
    side = CROP_SIDE * height / zoom
    focal = (distance - float(points[..., 2].mean())) / side
    return focal, distance, float(middle[0] + dx * side), float(middle[1] + (dy - CROP_DROP * 0.57) * side)


def _box(points: np.ndarray) -> np.ndarray:
    return np.array([*points[:, :2].min(0), *points[:, :2].max(0)], np.float32)


def _place(head: Head, motion: np.ndarray, shift: np.ndarray, camera: tuple[float, float, float, float]) -> np.ndarray:
    """The translation channels: the face's rigid middle from the crop's, and the logarithm of its relative size."""
    marks = landmarks()
    still = head.vertices[marks.face]
    middle = np.array([[0, (head.top + head.chin) / 2, still[:, 2].mean()]], np.float32)
    whole = Head(**{**head.__dict__, "follow": np.ones(1, np.float32)})
    seen = _project(turn(whole, middle, motion, shift).astype(np.float32), camera, 1)[0]
    size = head.face_height * camera[0] / seen[2] * CROP_SIDE
    return np.array([seen[0] - 0.5, seen[1] - 0.5, np.log(size)], np.float32)


def _develop(linear: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What the camera makes of linear light: gain, blur, tone, noise, compression; uint8."""
    camera = scene.camera
    picture = np.clip(linear * camera.gain, 0, 1) ** (1 / GAMMA) * 255
    if camera.blur:
        picture = cv2.GaussianBlur(picture, (0, 0), camera.blur * linear.shape[0] / 64)
    if camera.noise:
        picture = picture + rng.standard_normal(picture.shape).astype(np.float32) * np.float32(camera.noise)
    out = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    if camera.quality < 100:
        out = cv2.imdecode(cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, camera.quality])[1], cv2.IMREAD_COLOR)
    return out


def render_frames(
    head: Head, scene: Scene, motion: np.ndarray, shift: np.ndarray, size: int, sampling: int
) -> dict[str, np.ndarray]:
    """Pictures and geometric truth of a performance; fills in the translation channels of ``motion``."""
    rng = np.random.default_rng([scene.seed, 15])
    faces = [express(head, m) for m in motion]
    mouth = np.array([lip_opening(head, v) for v in faces], np.float32)
    posed = [turn(head, v, m, s).astype(np.float32) for v, m, s in zip(faces, motion, shift, strict=True)]
    camera = _aim(head, posed, scene)
    texture, light = dress(head.texture, scene), scene.light.packed()
    behind = paint_background(scene, size) ** GAMMA
    big = size * sampling
    frames, boxes = [], []
    for i, vertices in enumerate(posed):
        motion[i, TRANSLATION] = _place(head, motion[i], shift[i], camera)
        screen = _project(vertices, camera, big)
        picture, depth = np.zeros((big, big, 3), np.float32), np.full((big, big), 1e9, np.float32)
        normals = raster.vertex_normals(vertices, head.triangles)
        raster.draw(screen, normals, head.openness, head.triangles, head.uv, head.kind, texture, raster.materials(),
                    light, picture, depth)  # fmt: skip
        cover = (depth < 1e8).astype(np.float32)
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
        cover = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA)[..., None]
        frames.append(_develop(picture + (1 - cover) * behind, scene, rng))
        boxes.append(_box(screen[landmarks().face]) / sampling)
    empty = np.clip(behind * scene.camera.gain, 0, 1) ** (1 / GAMMA) * 255 + 0.5
    return {
        "frames": np.stack(frames),
        "mouth": mouth,
        "facebox": np.stack(boxes),
        "background": empty.astype(np.uint8),
    }


def caption(head: Head, scene: Scene) -> str:
    """A plain description of who is seen and where."""
    a = head.attributes
    age, skin = float(str(a["age"])), float(str(a["skin"]))
    years = "a young" if age < 0.3 else "a middle-aged" if age < 0.6 else "an old"
    person = {"female": "woman", "male": "man"}[str(a["sex"])]
    tone = "fair" if skin < 0.25 else "tanned" if skin < 0.5 else "brown" if skin < 0.75 else "dark"
    style, colour, beard = str(a["hair"]), str(a["hair_colour"]), str(a["beard"])
    if style == "bald":
        hair = "no hair"
    else:
        hair = {"bun": f"{colour} hair in a bun", "pigtails": f"{colour} hair in pigtails"}.get(
            style, f"{style} {colour} hair"
        )
    parts = [f"{years} {person} with {tone} skin and {hair}"]
    if beard != "none":
        parts.append({"stubble": "stubble", "full": "a full beard"}.get(beard, f"a {beard}"))
    if a["glasses"]:
        parts.append(f"{a['glasses']} glasses")
    article = "an" if scene.clothes[0] in "aeiou" else "a"
    parts.append(f"in {article} {scene.clothes} {GARMENTS[scene.neckline]}")
    parts.append(f"in front of {PLACES[scene.background]}")
    side = str(scene.attributes["light"])
    return ", ".join(parts + ([] if side == "front" else [f"lit from the {side}"]))


def make_clip(speaker: Speaker | None, identity: int, take: int, *, frames: int = 77, size: int = 64, sampling: int = 3,
              held_out: bool = False, lead: float | None = None,
              track: Utterance | None = None) -> Clip:  # fmt: skip
    """Take number ``take`` of an identity: the same person, voice and style, another scene and sentence.

    The same arguments give the same clip. ``held_out`` chooses voices and sentences that are kept out of training.
    ``track`` is said instead of what ``speaker`` would say, by a recorded voice.
    """
    head, scene = head_of(identity), draw_scene(identity * 1009 + take)
    style, voice = manner_of(identity, held_out)
    rng = np.random.default_rng([identity, take, 22])
    title = "recorded" if track is not None else voice.title
    if track is None:
        if speaker is None:
            raise InputError("make_clip: expected a speaker or a track, got neither")
        track = make_track(speaker, voice, rng, frames, lead, held_out)
    motion, shift = perform(track, style, rng, frames)
    seen = render_frames(head, scene, motion, shift, size, sampling)
    meta = {
        "identity": identity, "take": take, "seed": scene.seed, "voice": title, "sentence": track.text,
        "caption": caption(head, scene), "style": asdict(style), "scene": scene.attributes,
        "attributes": head.attributes,
    }  # fmt: skip
    return Clip(
        frames=seen["frames"],
        audio=np.round(track.wave * 32767).astype(np.int16),
        motion=motion,
        phonemes=phonemes_of_frames(track, frames),
        mouth=seen["mouth"],
        background=seen["background"],
        facebox=seen["facebox"],
        meta=meta,
    )
