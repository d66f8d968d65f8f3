"""The two sets of cases: rendered people with exact truth (committed), and clips of real people (by manifest).

A procedural case is a folder of ``tests/data/cases``, written by ``training.data.cases``. A real one is a row of
``real.csv``: the file's name and the beginning of its SHA-1, whose face it is, and which seconds of it are the
reference and which are the target, whose own sound drives the generation. Clips of 6 s or more are cut in two halves;
of a shorter one (GRID's are 3 s) both are the whole clip, so its reference shows the very mouth that is asked for.
``speech`` says ``own``, or ``other`` for a clip without speech: it is driven by a recording given beside it and has no
target. Clips and recordings are not part of the repository.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avatar_rt.config import FPS, SAMPLES_PER_FRAME
from avatar_rt.errors import InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.reader import iter_frames, read_image, read_video, read_video_audio
from bench.quality.clip import Case, Clip
from bench.quality.faces import crops, find_faces

CASES = Path(__file__).parents[2] / "tests" / "data" / "cases"
MANIFEST = Path(__file__).parent / "real.csv"
BAR_CASES = 24  # the cases that the shipped weights' bars are measured on: the first of the 36
REFERENCE_SECONDS = (1, 2, 4, 8)
REAL_SIZE = 256  # real clips are scored as face-centred squares of so many pixels, like the rendered ones
SOUND = {".flac", ".wav", ".mp3", ".m4a", ".ogg"}
STYLE_NAMES = (
    "gain", "lead", "slack", "lopsided", "smile", "wide", "sway_yaw", "sway_pitch", "sway_roll", "sway_speed", "nod",
    "blink", "gaze", "brow",
)  # fmt: skip
"""What ``Case.truth["style"]`` holds, in order; the meanings are those of ``training.data.perform.Style``."""

_MAX_SIDE = 800  # a clip is read no larger
_TRUTH = ("motion", "mouth", "facebox")


@dataclass(frozen=True)
class RealClip:
    """One row of the manifest; spans are (start, end) in seconds."""

    file: str
    sha1: str
    identity: str
    reference: tuple[float, float]
    target: tuple[float, float]
    own_speech: bool
    sync_lag: int | None
    licence: str

    @property
    def name(self) -> str:
        return Path(self.file).stem


@dataclass(frozen=True)
class Source:
    """Where one case is read from, so that a set of many need not be held in memory.

    Attributes:
        path: Folder of a procedural case, or of the real clips.
        clip: The manifest's row; None for a procedural case.
        scene: A picture of an empty place for a real case.
        speech: A recording for a real case without speech of its own; None leaves it without any.
        seconds: Length of the reference that is used; None is all of it.
    """

    path: Path
    clip: RealClip | None = None
    scene: Path | None = None
    speech: Path | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.clip.name if self.clip else self.path.name

    def read(self) -> Case:
        """Raises InputError as ``read_case`` and ``read_real``."""
        return read_real(self) if self.clip else read_case(self.path, self.seconds)


def procedural(root: Path = CASES) -> list[Path]:
    """Folders of the procedural cases, in order. Raises InputError where there are none."""
    found = sorted(p for p in Path(root).glob("case-*") if p.is_dir())
    if not found:
        raise InputError(f"{root}: expected a folder of cases (case-00, ...), found none")
    return found


def read_case(path: Path, seconds: float | None = None) -> Case:
    """A procedural case.

    Args:
        path: Its folder.
        seconds: Length of the reference (1, 2, 4 or 8), None for all of it; one frame more is read, for whole latents.

    Returns: The case; besides what ``Case`` names, ``truth`` has ``style`` fp32 [14] (STYLE_NAMES) and
        ``reference_background`` uint8 [H, W, 3], the reference's place without the person.
    Raises: InputError on a file that is missing, damaged, or does not fit the others.
    """
    path = Path(path)
    clip = read_video(path / "reference.mp4")
    frames, sound = clip.frames, clip.audio
    if seconds is not None:
        if not 0 < seconds * FPS <= len(frames):
            raise InputError(f"{path.name}: expected a reference of up to {len(frames) / FPS:g} s, got {seconds:g}")
        frames = frames[: round(seconds * FPS) + 1]
        sound = None if sound is None else sound[: len(frames) * SAMPLES_PER_FRAME]
    target = read_video(path / "target.mp4")
    truth, meta = _truth(path), _meta(path)
    lengths = {name: len(truth[name]) for name in _TRUTH} | {"target.mp4": len(target.frames)}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{path.name}: expected one length of target and truth, got {lengths}")
    truth["reference_background"] = read_image(path / "reference_background.jpg")
    return Case(
        path.name, "procedural", str(meta["identity"]), Clip(frames, sound), read_audio(path / "speech.wav").samples,
        read_image(path / "scene.png"), Clip(target.frames, target.audio), truth,
    )  # fmt: skip


def real(manifest: Path = MANIFEST, folder: Path | None = None, speech: Path | None = None) -> list[Case]:
    """All real cases at once, about 20 MB each. Args, errors: those of ``real_sources`` and ``read_real``."""
    return [source.read() for source in real_sources(manifest, folder, speech)]


def real_sources(manifest: Path = MANIFEST, folder: Path | None = None, speech: Path | None = None) -> list[Source]:
    """Sources of the manifest's cases; a file that is not there is found out when it is read.

    Args:
        manifest: The table.
        folder: The clips.
        speech: Recordings that drive the clips without speech of their own.
    """
    if folder is None or not Path(folder).is_dir():
        raise InputError(f"{folder}: expected the folder of the clips that {Path(manifest).name} names, there is none")
    rows, places = read_manifest(manifest), sorted(CASES.glob("case-*/scene.png"))
    voices = sorted(p for p in Path(speech).iterdir() if p.suffix.lower() in SOUND) if speech is not None else []
    return [
        Source(
            Path(folder), row, places[i % len(places)] if places else None,
            voices[i * len(voices) // len(rows)] if voices and not row.own_speech else None,
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def read_manifest(path: Path = MANIFEST) -> list[RealClip]:
    """The rows of a manifest. Raises InputError naming the line that is wrong."""
    rows = []
    with open(path, newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                lag = int(row["sync_lag"]) if row["sync_lag"] else None
                rows.append(RealClip(
                    row["file"], row["sha1"], row["identity"], _span(row["reference"]), _span(row["target"]),
                    {"own": True, "other": False}[row["speech"]], lag, row["licence"],
                ))  # fmt: skip
            except (KeyError, ValueError, TypeError, AttributeError):
                raise InputError(
                    f"{path}, line {line}: expected file, sha1, identity, reference and target as start-end in "
                    f"seconds, speech (own or other), sync_lag, licence; got {list(row.values())}"
                ) from None
    return rows


def read_real(source: Source) -> Case:
    """A real case, its clips as face-centred squares of REAL_SIZE pixels at 25 fps.

    Raises: InputError when the file is missing or another, has no face, or there is no speech to drive it.
    """
    clip = source.clip
    assert clip is not None
    reference, target = (_cut(source.path, clip, span) for span in (clip.reference, clip.target))
    scene = read_image(source.scene) if source.scene is not None else None
    if clip.own_speech and target.sound is not None:
        return Case(clip.name, "real", clip.identity, reference, target.sound, scene, target)
    if source.speech is None:
        raise InputError(f"{clip.file}: it has no speech of its own; give a folder of recordings to drive it with")
    seconds = clip.target[1] - clip.target[0]
    return Case(
        clip.name, "real", clip.identity, reference, read_audio(source.speech, max_seconds=seconds).samples, scene
    )


def read_halves(folder: Path, clip: RealClip) -> tuple[np.ndarray, np.ndarray]:
    """Two stretches of one clip that share no frame, uint8 [F, S, S, 3] each: the parts, or the halves of the whole."""
    if clip.reference != clip.target:
        first, second = (_cut(folder, clip, span).frames for span in (clip.reference, clip.target))
        return first, second
    whole = _cut(folder, clip, clip.reference).frames
    return whole[: len(whole) // 2], whole[len(whole) // 2 :]


def _cut(folder: Path, clip: RealClip, span: tuple[float, float]) -> Clip:
    path = folder / clip.file
    if not path.is_file():
        raise InputError(f"{clip.file}: the manifest names it, but it is not in {folder}")
    got = hashlib.sha1(path.read_bytes()).hexdigest()
    if not got.startswith(clip.sha1):
        raise InputError(f"{clip.file}: expected the file whose SHA-1 begins with {clip.sha1}, got {got[:12]}")
    first = round(span[0] * FPS)
    wanted = [f for i, f in enumerate(iter_frames(path, max_seconds=span[1], max_side=_MAX_SIDE)) if i >= first]
    if not wanted:
        raise InputError(f"{clip.file}: expected {span[1]:g} s of video, got less than {span[0]:g} s")
    frames = np.stack(wanted)
    faces = find_faces(frames)
    if not faces.found.any():
        raise InputError(f"{clip.file}: no face was found between {span[0]:g} and {span[1]:g} s")
    sound = read_video_audio(path, num_frames=first + len(frames))
    return Clip(crops(frames, faces, REAL_SIZE), None if sound is None else sound[first * SAMPLES_PER_FRAME :])


def _span(text: str) -> tuple[float, float]:
    start, end = map(float, text.split("-"))
    if not 0 <= start < end:
        raise ValueError(text)
    return start, end


def _truth(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path / "truth.npz") as file:
            return {name: file[name].astype(np.float32) for name in (*_TRUTH, "style")}
    except (OSError, KeyError, ValueError) as e:
        raise InputError(f"{path.name}: expected a truth.npz with {', '.join(_TRUTH)} and style ({e})") from None


def _meta(path: Path) -> dict:
    try:
        meta = json.loads((path / "meta.json").read_text())
        meta["identity"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path.name}: expected a meta.json that names the identity ({e})") from None
    return dict(meta)
