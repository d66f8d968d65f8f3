"""Rendered people who speak with recorded voices: ``python -m training.data.recorded --speech DIR --out DIR``.

Reads what training.data.align wrote (sound and the phone of each video frame) and writes a corpus of shards. Each
recording gets a person of its own; every sixteenth speaker's people belong to the validation split, so that no voice is
heard on both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avatar_rt.errors import AvatarError, InputError
from training.data.clip import make_clip
from training.data.corpus import VALIDATION_STRIDE
from training.data.phonemes import ID, SILENCE
from training.data.render import SHARD_CLIPS, write_shard
from training.data.speech import FPS, SAMPLES_PER_FRAME, Utterance

FIRST_IDENTITY = 5_000_000  # people whom no other corpus of training/data renders
FRAMES, STEP = 77, 60
MIN_ALIGNED, MIN_SOUNDING = 0.97, 0.5
LEVEL = 0.08  # RMS, as of the synthesised voices


def speaker_of(path: Path) -> str:
    """Files are named as LibriSpeech names them, SPEAKER-CHAPTER-NUMBER, after any prefix that ends in ``__``."""
    return path.stem.rpartition("__")[2].split("-")[0]


def identities(files: list[Path]) -> list[int]:
    """One identity per recording; those of every sixteenth speaker are multiples of VALIDATION_STRIDE."""
    held_out = set(sorted({speaker_of(f) for f in files})[::16])
    return [
        FIRST_IDENTITY + VALIDATION_STRIDE * i + (0 if speaker_of(f) in held_out else 1) for i, f in enumerate(files)
    ]


def pieces(phones: np.ndarray) -> Iterator[int]:
    """First frames of stretches of FRAMES frames that are aligned almost throughout and mostly speech."""
    first = 0
    while first + FRAMES <= len(phones):
        window = phones[first : first + FRAMES]
        if (window != "").mean() >= MIN_ALIGNED and (window != "SIL").mean() >= MIN_SOUNDING:
            yield first
            first += STEP
        else:
            first += 5


def track_of(wave: np.ndarray, phones: np.ndarray, first: int) -> Utterance:
    """A stretch as an utterance; a phone that lasts for several frames is one sound."""
    names = phones[first : first + FRAMES]
    ids = [ID.get(name, SILENCE) for name in names.tolist()]
    starts = [i for i in range(FRAMES) if i == 0 or ids[i] != ids[i - 1]]
    ends = [*starts[1:], FRAMES]
    sounds = tuple((ids[a], a / FPS, b / FPS) for a, b in zip(starts, ends, strict=True))
    cut = wave[first * SAMPLES_PER_FRAME : (first + FRAMES) * SAMPLES_PER_FRAME].astype(np.float32) / 32768
    cut = cut * (LEVEL / (np.sqrt(np.mean(cut**2)) + 1e-6))
    return Utterance(np.clip(cut, -0.99, 0.99), sounds, "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.data.recorded", description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of .npz written by training.data.align")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--sampling", type=int, default=2)
    a = parser.parse_args(arguments)
    try:
        files = sorted(a.speech.glob("*.npz"))
        if not files:
            raise InputError(f"--speech {a.speech}: expected .npz files of training.data.align, found none")
        clips, count, began = [], 0, 0
        for identity, file in zip(identities(files), files, strict=True):
            with np.load(file) as saved:
                wave, phones = saved["wave"], saved["phones"]
            for take, first in enumerate(pieces(phones)):
                track = track_of(wave, phones, first)
                clips.append(make_clip(None, identity, take, size=a.size, sampling=a.sampling, track=track))
                if len(clips) == SHARD_CLIPS:
                    write_shard(a.out / f"shard-{began:05d}", clips)
                    clips, count, began = [], count + SHARD_CLIPS, began + 1
                    print(f"{count} clips", flush=True)
        if clips:
            write_shard(a.out / f"shard-{began:05d}", clips)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
