"""Speech and mouth without pictures, much faster than the corpus: ``python -m training.data.talk --out DIR --clips N``.

The same voices, sentences, styles and labels as the corpus has, in one ``talk.npz``; a share of the clips uses only
voices that no training clip has. The lip opening is measured on one head, identity 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from avatar_rt.errors import UnsupportedError
from training.data.heads import express, lip_opening, make_head
from training.data.perform import draw_style, perform
from training.data.speech import Speaker, draw_voice, make_track, phonemes_of_frames

CLIP_FRAMES = 77


class Talk:
    """Clips of ``talk.npz`` with the methods of a corpus, as far as sound and mouth go."""

    def __init__(self, path: Path, split: str) -> None:
        with np.load(path) as saved:
            chosen = saved["held_out"] == (split == "val")
            self._audio, self._phonemes = saved["audio"][chosen], saved["phonemes"][chosen]
            self._motion, self._mouth = saved["motion"][chosen], saved["mouth"][chosen]

    def __len__(self) -> int:
        return len(self._audio)

    def audio(self, clip: int, start: int, count: int) -> np.ndarray:
        return self._audio[clip, start * 640 : (start + count) * 640]

    def phonemes(self, clip: int, start: int, count: int) -> np.ndarray:
        return self._phonemes[clip, start : start + count]

    def motion(self, clip: int, start: int, count: int) -> np.ndarray:
        return self._motion[clip, start : start + count]

    def mouth(self, clip: int, start: int, count: int) -> np.ndarray:
        return self._mouth[clip, start : start + count]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.talk", description="Speech and mouth, no pictures.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=80, help="of these, clips by voices kept out of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    speaker, head = Speaker(), make_head(0)
    parts: dict[str, list[np.ndarray]] = {"audio": [], "phonemes": [], "motion": [], "mouth": [], "held_out": []}
    for clip in range(args.clips):
        rng = np.random.default_rng([args.seed, clip, 31])
        held_out = clip < args.held_out
        voice = draw_voice(rng, "female" if clip % 2 else "male", held_out)
        try:
            track = make_track(speaker, voice, rng, CLIP_FRAMES)
        except UnsupportedError as e:
            print(f"clip {clip}: left out, {e}")
            continue
        motion, _ = perform(track, draw_style(rng), rng, CLIP_FRAMES)
        parts["audio"].append(np.round(track.wave * 32767).astype(np.int16))
        parts["phonemes"].append(phonemes_of_frames(track, CLIP_FRAMES))
        parts["motion"].append(motion)
        parts["mouth"].append(np.array([lip_opening(head, express(head, m)) for m in motion], np.float32))
        parts["held_out"].append(np.array(held_out))
        if clip % 100 == 99:
            print(f"{clip + 1} of {args.clips}", flush=True)
    speaker.close()
    np.savez(args.out / "talk.npz", **{name: np.stack(values) for name, values in parts.items()})


if __name__ == "__main__":
    main()
