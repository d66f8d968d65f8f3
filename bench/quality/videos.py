"""Folders of videos, one per system, as a browser can show them.

A system is a folder of videos named after the cases: ``case-07.mp4``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import cv2
import numpy as np

from avatar_rt.config import FPS, SAMPLE_RATE
from avatar_rt.errors import InputError
from avatar_rt.media.reader import VideoClip, read_video
from avatar_rt.media.writer import VideoWriter

EXTENSIONS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".mpg")
PLAYED = {("h264", "yuv420p"), ("vp9", "yuv420p")}  # by every browser, in .mp4 and .webm


def parse_systems(given: list[str]) -> dict[str, Path]:
    """``["tiny=out/tiny"]`` -> {"tiny": Path}. Raises: InputError on another form, a name twice or no such folder."""
    systems: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in systems:
            raise InputError(f"--videos: expected SYSTEM=DIR with a name of its own, got {text!r}")
        if not Path(folder).is_dir():
            raise InputError(f"--videos: expected a folder for {name}, but there is no folder {folder}")
        systems[name] = Path(folder)
    return systems


def find_videos(folder: Path) -> dict[str, Path]:
    """{case: file} of a folder. Raises: InputError when two files are of one case."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(
                f"{folder}: expected one video of {path.stem}, got {found[path.stem].name} and {path.name}"
            )
        found[path.stem] = path
    return found


def case_videos(folder: Path, name: str) -> dict[str, Path]:
    """{case: FOLDER/case/name.mp4} of a folder of cases, those that are there; ``name``: ``reference``, ``target``."""
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{name}.mp4"))}


def is_played(path: Path) -> bool:
    """Whether browsers play the file as it is, by its container, codec and pixel format."""
    if path.suffix.lower() not in (".mp4", ".webm"):
        return False
    try:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            return (video.codec_context.name, video.pix_fmt) in PLAYED
    except (av.error.FFmpegError, IndexError):
        return False


def to_browser(source: Path, folder: Path, name: str) -> tuple[Path, VideoClip]:
    """Copy a video into a folder as ``name`` and read it; what browsers do not play is written anew as H.264.

    Raises: InputError on a file that cannot be read.
    """
    clip = read_video(source)
    folder.mkdir(parents=True, exist_ok=True)
    if is_played(source):
        return Path(shutil.copyfile(source, folder / f"{name}{source.suffix.lower()}")), clip
    return write(folder / f"{name}.mp4", clip.frames, clip.audio), clip


def write(path: Path, frames: np.ndarray, sound: np.ndarray | None) -> Path:
    """H.264 and AAC from uint8 [F, H, W, 3] and fp32 [S] at 16 kHz; an odd side repeats its last line."""
    odd = [(0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)]
    frames = np.pad(frames, odd, mode="edge") if any(after for _, after in odd) else frames
    audio = None if sound is None else (sound, SAMPLE_RATE)
    with VideoWriter(path, frames.shape[1:3], FPS, audio=audio) as writer:
        writer.write(frames)
    return path


def strip(frames: np.ndarray, columns: int, height: int) -> np.ndarray:
    """Evenly spaced frames side by side, first and last among them: uint8 [height, about columns * width, 3]."""
    picks = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    how = cv2.INTER_AREA if height < frames.shape[1] else cv2.INTER_CUBIC
    return np.hstack([cv2.resize(frames[i], (width, height), interpolation=how) for i in picks])


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """A JPEG of uint8 [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())
    return path
