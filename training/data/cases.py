"""The held-out cases: ``python -m training.data.cases --out DIR [--count 36]``; with ``--demo`` the demonstration pair.

``--first 36`` writes those after them, of other people: to choose settings on, so that the cases may judge them.

DIR/case-XX/ holds what a generation gets (reference.mp4 with sound, 8 s; scene.png; speech.wav, 4 s) and what it is
measured against: target.mp4, the same person saying it in that scene; truth.npz of the target's frames: motion [F, 62],
mouth [F], facebox [F, 4], float16, and style [14], float32, in the order of ``perform.Style``;
reference_background.jpg, the reference's place without the person; meta.json. A case follows from its number alone, and
no identity, voice or sentence occurs in a training corpus. DIR/demo/ holds reference.mp4, 256 pixels square, and
speech.wav.
"""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import soundfile

from avatar_rt.errors import AvatarError
from training.data.clip import Clip, head_of, make_clip, manner_of
from training.data.perform import FPS
from training.data.render import TRAINING_IDENTITIES
from training.data.speech import RATE, Speaker, make_track

REFERENCE_FRAMES, TARGET_FRAMES = 201, 101  # 8 s and 4 s, whole latents
SIZE, SAMPLING, COUNT = 128, 2, 36
DEMO_FRAMES, DEMO_SIZE, DEMO_SECONDS = 101, 256, 5
DEMO_IDENTITY = TRAINING_IDENTITIES + 1016


def write_video(path: Path, frames: np.ndarray, audio: np.ndarray, crf: int, bit_rate: int = 40_000) -> None:
    """h264 and aac at 25 fps."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "veryslow", "threads": "1"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        sound.bit_rate = bit_rate
        sound.time_base = Fraction(1, RATE)
        for picture in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode(None))
        for start in range(0, len(audio), 1024):
            block = av.AudioFrame.from_ndarray(audio[None, start : start + 1024], format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, start, Fraction(1, RATE)
            file.mux(sound.encode(block))
        file.mux(sound.encode(None))


def render_case(speaker: Speaker, identity: int, size: int = SIZE) -> tuple[Clip, Clip]:
    """The reference and the target of a case: one person, voice and manner, two scenes and sentences."""
    reference, target = (
        make_clip(speaker, identity, take, frames=frames, size=size, sampling=SAMPLING, held_out=True)
        for take, frames in ((0, REFERENCE_FRAMES), (1, TARGET_FRAMES))
    )
    return reference, target


def write_case(folder: Path, reference: Clip, target: Clip) -> None:
    """One case. The speech is stored with mu-law companding, half the size of plain samples."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / "reference.mp4", reference.frames, reference.audio, 22, 32_000)
    write_video(folder / "target.mp4", target.frames, target.audio, 20, 32_000)
    soundfile.write(folder / "speech.wav", target.audio, RATE, subtype="ULAW")
    cv2.imwrite(str(folder / "scene.png"), target.background[..., ::-1])
    behind = reference.background[..., ::-1]
    cv2.imwrite(str(folder / "reference_background.jpg"), behind, [cv2.IMWRITE_JPEG_QUALITY, 92])
    truth = {name: getattr(target, name).astype(np.float16) for name in ("motion", "mouth", "facebox")}
    style = np.array([v for x in target.meta["style"].values() for v in np.ravel(x)], np.float32)  # type: ignore[attr-defined]
    np.savez_compressed(folder / "truth.npz", style=style, **truth)
    shared = {k: target.meta[k] for k in ("identity", "voice", "style")}
    each = {
        name: {k: clip.meta[k] for k in ("take", "caption", "sentence", "scene")}
        for name, clip in (("reference", reference), ("target", target))
    }
    (folder / "meta.json").write_text(json.dumps(shared | each, indent=1) + "\n")


def case_identities(count: int) -> list[int]:
    """Held-out identities, women and men in turn."""
    found: dict[str, list[int]] = {"female": [], "male": []}
    identity = TRAINING_IDENTITIES
    while min(map(len, found.values())) < (count + 1) // 2:
        found[str(head_of(identity).attributes["sex"])].append(identity)
        identity += 1
    pairs = zip(found["female"], found["male"], strict=False)
    return [i for pair in pairs for i in pair][:count]


def write_demo(folder: Path, speaker: Speaker) -> None:
    """A clear picture of an unseen person, and a longer stretch of the same voice saying something else."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = make_clip(speaker, DEMO_IDENTITY, 0, frames=DEMO_FRAMES, size=DEMO_SIZE, sampling=2, held_out=True, lead=0.2)
    write_video(folder / "reference.mp4", clip.frames, clip.audio, 16)
    _, voice = manner_of(DEMO_IDENTITY, held_out=True)
    track = make_track(speaker, voice, np.random.default_rng([DEMO_IDENTITY, 31]), DEMO_SECONDS * FPS, 0.25, True)
    soundfile.write(folder / "speech.wav", track.wave, RATE, subtype="PCM_16")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.data.cases", description="Render the held-out cases.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--demo", action="store_true", help="only the demonstration pair")
    a = parser.parse_args(arguments)
    speaker = Speaker()
    try:
        if a.demo:
            write_demo(a.out / "demo", speaker)
            return 0
        for i, identity in enumerate(case_identities(a.first + a.count)[a.first :], a.first):
            reference, target = render_case(speaker, identity, a.size)
            write_case(a.out / f"case-{i:02d}", reference, target)
            print(f"case-{i:02d}: {target.meta['caption']}; {target.meta['voice']}", flush=True)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    finally:
        speaker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
