"""Real videos on their way to clips: one small function per stage, each from one type to the next.

``survey`` (scene cuts) -> ``follow`` (face tracks of the shots) -> ``segment`` (windows that may become clips) ->
``cut`` (crops and sound) -> ``check_sync`` -> ``describe`` (motion, who and where). A stage gives what comes next or
``Rejected`` with the stage's name and a reason; it neither writes nor knows the other stages, so that a curation engine
can put its own in between. A video of any length passes in the memory of one clip, because each pass decodes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from scenedetect import AdaptiveDetector, FrameTimecode

from avatar_rt.config import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from avatar_rt.errors import InputError
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.media.face import CROP_DROP, CROP_SIDE, FaceTrack, crop_face, detect_faces, track_face
from avatar_rt.media.mouth import mouth_crops
from avatar_rt.media.reader import iter_frames, read_video_audio
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.sync import PIXELS, SyncNetwork
from avatar_rt.pipeline.reference import to_video
from training.data.pairs import describe_place

LOOK_SIDE = 640  # pixels of the longer side while looking; crops are cut from the full picture
CUT_SIDE = 320
MAX_OFFSET = 15  # frames that the sync check looks to each side


Embedder = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A crop uint8 [S, S, 3] and its face box [4] -> a vector that says who it is."""


@dataclass(frozen=True)
class Rules:
    """What a clip must be. Defaults in brackets.

    Attributes:
        frames: its length [77: 20 latents, 3.08 s].
        cut: PySceneDetect's adaptive threshold [2.0, lower cuts more].
        present: share of its frames in which the face is found [0.95].
        face: pixels from hairline to chin in the video [48].
        other_face: a second face of this share of the speaker's height refuses the clip [0.6].
        level: RMS of its loudest frame, of full scale 1 [0.003].
        in_step, realign: a sound found later or earlier by up to ``in_step`` frames is left [1]; by up to ``realign``
            it is moved [6]; by more the clip is refused.
        confidence: how far the best offset must stand out, in our scorer's distance [0.05].
    """

    frames: int = 77
    cut: float = 2.0
    present: float = 0.95
    face: float = 48.0
    other_face: float = 0.6
    level: float = 0.003
    in_step: int = 1
    realign: int = 6
    confidence: float = 0.05


@dataclass(frozen=True)
class Rejected:
    """A stretch of a video that is no clip, frames ``first`` .. ``last`` - 1 at 25 fps."""

    first: int
    last: int
    stage: str
    reason: str


@dataclass(frozen=True)
class Shot:
    """Frames between two cuts."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True)
class Tracked:
    """A shot with its face, boxes in pixels of a picture ``shape`` (height, width); ``others`` bool per frame: another
    face is there; ``places``: what the background looks like, (frame, descriptor) now and then."""

    shot: Shot
    track: FaceTrack
    shape: tuple[int, int]
    others: np.ndarray
    places: tuple[tuple[int, np.ndarray], ...]


@dataclass(frozen=True)
class Segment:
    """A window of a shot: frames ``first`` .. ``first + frames`` of the video, its boxes, its place."""

    shot: Shot
    first: int
    track: FaceTrack
    shape: tuple[int, int]
    place: np.ndarray


@dataclass(frozen=True)
class Clip:
    """A window with its pictures and sound.

    Attributes:
        crops: uint8 [F, S, S, 3]; boxes: float32 [F, 4] in the crops' pixels.
        sound: fp32 [F * 640]; whole: the video's, from which a moved one is cut.
        offset, confidence: frames by which the sound was late and how sure that is; None where nobody looked.
        moved: frames by which the sound has been brought forward.
    """

    segment: Segment
    crops: np.ndarray
    boxes: np.ndarray
    sound: np.ndarray
    whole: np.ndarray
    offset: int | None = None
    confidence: float | None = None
    moved: int = 0


@dataclass(frozen=True)
class Described:
    """A clip with what was read off it: motion float32 [F, 62], who (a unit vector or None) and where."""

    clip: Clip
    motion: np.ndarray
    face: np.ndarray | None
    place: np.ndarray


def survey(path: Path, rules: Rules) -> list[Shot | Rejected]:
    """The shots of a video. Raises InputError on a file that is no video."""
    detector, cuts, count = AdaptiveDetector(adaptive_threshold=rules.cut, min_scene_len=FPS // 2), [0], 0
    for count, frame in enumerate(iter_frames(path, max_side=CUT_SIDE), 1):
        at = FrameTimecode(count - 1, fps=float(FPS))
        cuts += [c.frame_num for c in detector.process_frame(at, frame[..., ::-1])]
    cuts += [c.frame_num for c in detector.post_process(FrameTimecode(count, fps=float(FPS)))]
    edges = [*sorted(set(cuts)), count]
    shots: list[Shot | Rejected] = []
    for first, last in pairwise(edges):
        if last - first < rules.frames:
            reason = f"a shot of {(last - first) / FPS:.2f} s, expected {rules.frames / FPS:.2f} s"
            shots.append(Rejected(first, last, "survey", reason))
        else:
            shots.append(Shot(path, first, last))
    return shots


def follow(shots: list[Shot], rules: Rules) -> Iterator[Tracked | Rejected]:
    """The face of each shot, all in one pass over the video."""
    if not shots:
        return
    frames, at = iter_frames(shots[0].path, max_side=LOOK_SIDE), 0
    for shot in shots:
        skipped = sum(1 for _ in islice(frames, shot.first - at))
        seen = _Seen()
        try:
            track = track_face(seen.over(islice(frames, shot.last - shot.first)), name="the shot")
        except InputError as e:
            yield Rejected(shot.first, shot.last, "follow", str(e))
        else:
            yield Tracked(shot, track, seen.shape, seen.others(track, rules.other_face), seen.places(track))
        at += skipped + seen.count


class _Seen:
    """What is noted of a shot's frames while they pass by to the tracker, every twelfth: all faces, a small picture."""

    def __init__(self) -> None:
        self.count, self.shape = 0, (0, 0)
        self.noted: list[tuple[int, np.ndarray, np.ndarray]] = []

    def over(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            if self.count % 12 == 0:
                small = cv2.resize(frame, (160, 120), interpolation=cv2.INTER_AREA)
                self.noted.append((self.count, detect_faces(frame), small))
            self.count, self.shape = self.count + 1, frame.shape[:2]
            yield frame

    def others(self, track: FaceTrack, share: float) -> np.ndarray:
        out = np.zeros(len(track.boxes), bool)
        for i, faces, _ in self.noted:
            x0, y0, x1, y1 = track.boxes[i]
            away = np.hypot(faces[:, 0] - (x0 + x1) / 2, faces[:, 1] - (y0 + y1) / 2) > 0.6 * (y1 - y0)
            out[max(i - 6, 0) : i + 6] |= bool((away & (faces[:, 3] > share * (y1 - y0))).any())
        return out

    def places(self, track: FaceTrack) -> tuple[tuple[int, np.ndarray], ...]:
        scale = np.array([160 / self.shape[1], 120 / self.shape[0]] * 2)
        return tuple((i, describe_place(small, track.boxes[i] * scale)) for i, _, small in self.noted)


def together(clips: Iterable[Clip | Rejected], most: int = 20) -> Iterator[list[Clip | Rejected]]:
    """Neighbouring clips of one shot, at most so many: what is judged together, and held in memory."""
    group: list[Clip | Rejected] = []
    for clip in clips:
        shot = next((c.segment.shot for c in group if isinstance(c, Clip)), None)
        if len(group) == most or (isinstance(clip, Clip) and shot not in (None, clip.segment.shot)):
            yield group
            group = []
        group.append(clip)
    if group:
        yield group


def segment(tracked: Tracked, rules: Rules) -> Iterator[Segment | Rejected]:
    """Windows of a shot, one after the other; each with one face that is there, and large enough."""
    shot, n = tracked.shot, rules.frames
    for start in range(0, shot.last - shot.first - n + 1, n):
        part = slice(start, start + n)
        track = FaceTrack(tracked.track.boxes[part], tracked.track.score[part], tracked.track.present[part])
        first = shot.first + start
        height = float(np.median(track.boxes[:, 3] - track.boxes[:, 1]))
        reason = None
        if track.present.mean() < rules.present:
            reason = f"its face is found in {track.present.mean():.0%} of it, expected {rules.present:.0%}"
        elif height < rules.face:
            reason = f"its face is {height:.0f} pixels high, expected {rules.face:.0f}"
        elif tracked.others[part].any():
            reason = "another face is in the picture"
        if reason is not None:
            yield Rejected(first, first + n, "segment", reason)
            continue
        place = min(tracked.places, key=lambda p: abs(p[0] - start - n // 2))[1]
        yield Segment(shot, first, track, tracked.shape, place)
    rest = (shot.last - shot.first) % n
    if rest:
        reason = f"{rest / FPS:.2f} s are left of the shot, expected {n / FPS:.2f} s"
        yield Rejected(shot.last - rest, shot.last, "segment", reason)


def cut(segments: list[Segment], size: int, rules: Rules) -> Iterator[Clip | Rejected]:
    """Crops of ``size`` pixels at full resolution, and the sound under them, all in one pass over the video."""
    if not segments:
        return
    last = segments[-1].first + rules.frames
    whole = read_video_audio(segments[0].shot.path, num_frames=last + MAX_OFFSET)
    if whole is None:
        yield from (Rejected(s.first, s.first + rules.frames, "cut", "the video has no sound") for s in segments)
        return
    frames, at = iter_frames(segments[0].shot.path), 0
    for s in segments:
        window = islice(frames, s.first - at, s.first - at + rules.frames)
        start, at = next(window), s.first + rules.frames
        scale = np.array([start.shape[1] / s.shape[1], start.shape[0] / s.shape[0]] * 2, np.float32)
        track = replace(s.track, boxes=s.track.boxes * scale)
        crops = crop_face(chain([start], window), track, size)
        sound = sound_at(whole, s.first, rules.frames)
        loudest = np.sqrt(np.square(sound.reshape(rules.frames, -1)).mean(1)).max()
        if loudest < rules.level:
            reason = f"its sound is silent: at most {loudest:.4f} of full scale, expected {rules.level}"
            yield Rejected(s.first, at, "cut", reason)
            continue
        yield Clip(s, crops, crop_boxes(track.boxes, size), sound, whole)


def sound_at(whole: np.ndarray, first: int, frames: int) -> np.ndarray:
    """Samples of some frames; silence beyond the ends."""
    at = np.arange(first * SAMPLES_PER_FRAME, (first + frames) * SAMPLES_PER_FRAME)
    inside = (at >= 0) & (at < len(whole))
    return np.where(inside, whole[np.clip(at, 0, len(whole) - 1)], 0).astype(np.float32)


def crop_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """Face boxes [F, 4] in a picture -> in the squares that ``crop_face`` cuts around them."""
    height = boxes[:, 3] - boxes[:, 1]
    side = CROP_SIDE * height
    corner = np.stack([(boxes[:, 0] + boxes[:, 2] - side) / 2,
                       (boxes[:, 1] + boxes[:, 3] - side) / 2 + CROP_DROP * height], axis=1)  # fmt: skip
    return ((boxes - np.tile(corner, 2)) / side[:, None] * size).astype(np.float32)


def check_sync(clips: list[Clip], network: SyncNetwork, rules: Rules) -> list[Clip | Rejected]:
    """Whether lips and sound fit, by our own scorer, judged together for clips of one shot: three seconds alone say
    little. A sound that is a little off is moved, and that is recorded."""
    if not clips:
        return []
    weights = [n / sum(len(c.crops) for c in clips) for n in (len(c.crops) for c in clips)]
    mean = sum(w * sync_distances(c, network) for w, c in zip(weights, clips, strict=True))
    late, sure = int(np.argmin(mean)) - MAX_OFFSET, float(np.median(mean) - np.min(mean))
    reason = None
    if sure < rules.confidence:
        reason = f"no offset stands out: by {sure:.3f}, expected {rules.confidence}"
    elif abs(late) > rules.realign:
        reason = f"its sound is {late:+d} frames late, expected at most {rules.realign}"
    if reason is not None:
        return [Rejected(c.segment.first, c.segment.first + rules.frames, "sync", reason) for c in clips]
    moved = late if abs(late) > rules.in_step else 0
    return [
        replace(c, offset=late, confidence=sure, moved=moved,
                sound=sound_at(c.whole, c.segment.first + moved, rules.frames))
        for c in clips
    ]  # fmt: skip


@torch.inference_mode()
def sync_distances(clip: Clip, network: SyncNetwork) -> np.ndarray:
    """Mean distance of lips and sound [31], for a sound that is 15 frames early to 15 late."""
    mouths = torch.from_numpy(mouth_crops(clip.crops, clip.boxes, PIXELS))[None]
    seen = network.picture_points(network.picture_features(mouths))[0]
    # The video lends the sound beyond the clip's ends, so that every offset compares as many windows.
    wide = sound_at(clip.whole, clip.segment.first - MAX_OFFSET, len(clip.crops) + 2 * MAX_OFFSET)
    wave = torch.from_numpy(normalise_loudness(wide, SAMPLE_RATE))[None]
    heard = network.sound_points(network.sound_features(wave))[0]
    n = len(seen)
    return np.array([float((seen - heard[k : k + n]).norm(dim=-1).mean()) for k in range(2 * MAX_OFFSET + 1)])


@torch.inference_mode()
def describe(
    clip: Clip, motion: MotionEncoder, embed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> Described:
    """Motion by our encoder; who it is by ``embed``, where given: the mean over five frames, of unit length."""
    size = motion.cfg.size
    small = np.stack([cv2.resize(c, (size, size), interpolation=cv2.INTER_AREA) for c in clip.crops])
    read = motion(to_video(small)[0].transpose(0, 1)).numpy()
    face = None
    if embed is not None:
        at = np.linspace(0, len(clip.crops) - 1, 5).astype(int)
        face = np.mean([embed(clip.crops[i], clip.boxes[i]) for i in at], axis=0)
        face = face / max(float(np.linalg.norm(face)), 1e-9)
    return Described(clip, read, face, clip.segment.place)
