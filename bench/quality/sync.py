"""Lip sync: LSE-C and LSE-D with SyncNet's weights where a user has them, ``LSE-C*`` and ``LSE-D*`` with our own.

    python -m bench.quality.sync --video FILE [--syncnet PATH]      scores of one video
    python -m bench.quality.sync --corpus DIR | --cases DIR | --real DIR     shift test: shares, JSON in the last line

The shift test moves a clip's sound by k = -10..10 frames and asks whether the offset that is found is k, give or take
one. Offset 0 is where lips close as the closure begins to sound. Rendered people's mouths are ahead of their sound by a
known time (their style's ``lead``, 60 to 110 ms), which is allowed for; of real clips nothing is known and nothing
corrected. DIR of ``--real`` holds ``clips`` and ``clips.csv`` (file, sync_lag); clips that an independent scorer found
more than two frames out of step are shown, and not counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt.config import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.face import read_face, track_face
from avatar_rt.media.reader import read_video
from bench.quality import lse
from bench.quality.clip import Case, Clip, Faces
from bench.quality.measure import Measure
from bench.quality.scorer import WEIGHTS, SyncScorer
from bench.quality.syncnet import EPS, SyncNetScorer

MIN_FRAMES = 75  # in a shorter video the zero vectors beyond its ends weigh too much
MIN_LEVEL = 1e-3  # RMS of the loudest frame, of full scale 1
MIN_FOUND = 0.5
SHIFTS = range(-10, 11)
USUAL_LEAD = 0.085  # seconds by which rendered mouths are ahead, where a case does not say
VALIDATION_STRIDE = 20  # every 20th identity of a corpus is for validation
IN_STEP = 2  # |sync_lag| of the real clips that count

MEASURES = (
    Measure("lse_c_star", "LSE-C*", "", "higher", "sync"),
    Measure("lse_d_star", "LSE-D*", "", "lower", "sync"),
    Measure("offset_star", "offset*, sound late", "frames", "target", "sync", target=0.0),
    Measure("in_step_star", "offset* within one frame", "share", "higher", "sync"),
)
_OWN = ("lse_c_star", "lse_d_star", "offset_star")


def refusal(frames: np.ndarray, faces: Faces, sound: np.ndarray | None) -> str | None:
    """Why a video has no sync score, or None."""
    if sound is None:
        return "it has no sound"
    length = min(len(frames), len(sound) // SAMPLES_PER_FRAME)
    if length < MIN_FRAMES:
        return f"it is too short: expected {MIN_FRAMES / FPS:g} s of picture and sound, got {length / FPS:.2f} s"
    level = np.sqrt(np.mean(sound[: length * SAMPLES_PER_FRAME].reshape(length, -1).astype(np.float64) ** 2, axis=1))
    if not level.max() >= MIN_LEVEL:
        return "its sound is silent"
    if faces.found.mean() < MIN_FOUND:
        return f"no face was found in {int((~faces.found).sum())} of its {len(frames)} frames"
    return None


def score_sync(
    frames: np.ndarray, faces: Faces, sound: np.ndarray | None, scorer: SyncScorer | None = None
) -> dict[str, float]:
    """Our own scores of a video.

    Args:
        frames: uint8 [F, H, W, 3] at 25 fps, of any size.
        faces: Of those frames.
        sound: fp32 [S] at 16 kHz, or None.
        scorer: Made here where it is None.

    Returns: ``lse_c_star``, ``lse_d_star`` and ``offset_star``, frames by which the sound is late (early below 0); all
        NaN where ``refusal`` has a reason.
    """
    return _scores(_table(frames, faces, sound, scorer))


def _table(frames: np.ndarray, faces: Faces, sound: np.ndarray | None, scorer: SyncScorer | None) -> np.ndarray | None:
    """``lse.distances`` of a video, or None where ``refusal`` has a reason."""
    if refusal(frames, faces, sound) is not None or sound is None:
        return None
    video, heard = (scorer or SyncScorer()).points(frames, faces.boxes, sound)
    count = lse.usable_windows(len(frames), len(sound))
    return lse.distances(video[:count], heard[:count])


def _scores(table: np.ndarray | None) -> dict[str, float]:
    if table is None:
        return dict.fromkeys(_OWN, float("nan"))
    found = lse.decide(table)
    return {"lse_c_star": found.lse_c, "lse_d_star": found.lse_d, "offset_star": float(found.late)}


def measure(case: Case, video: Clip, faces: Faces, context: Any) -> dict[str, float]:
    """The measures of one video; ``context.sync`` is a SyncScorer.

    A rendered person's mouth is ahead of the sound by a lead that the case's truth knows; their offset counts from it.
    """
    table = _table(video.frames, faces, video.sound, context.sync)
    if table is not None:  # how much the best offset stands out in each window: what drift looks at
        best = table[:, lse.decide(table).late + lse.MAX_OFFSET]
        context.series["sync"] = np.full(len(video.frames), np.nan)
        context.series["sync"][: len(table)] = np.median(table, axis=1) - best
    scores = _scores(table)
    offset = scores["offset_star"] - lead_of(case) * FPS
    return scores | {"offset_star": offset, "in_step_star": float(abs(offset) <= 1) if table is not None else offset}


def lead_of(case: Case) -> float:
    """Seconds by which the mouth of the case's true video is ahead of its sound; 0 for a real one."""
    if case.kind != "procedural":
        return 0.0
    return float(case.truth["style"][1]) if "style" in case.truth else USUAL_LEAD


def score_syncnet(
    frames: np.ndarray, boxes: np.ndarray | None, sound: np.ndarray, net: SyncNetScorer
) -> dict[str, float]:
    """LSE-C, LSE-D and SyncNet's offset (15 - argmin, so a late sound is below 0) of a video.

    ``boxes`` None says that the frames are crops of 224 pixels already. Raises InputError on less than one window.
    """
    count = lse.usable_windows(len(frames), len(sound))
    if not count:
        raise InputError(f"sync: expected more than {lse.WINDOW} frames with their sound, got {len(frames)}")
    video, heard = net.points(frames, boxes, sound, count)
    found = lse.decide(lse.distances(video, heard, EPS))
    return {"lse_c": found.lse_c, "lse_d": found.lse_d, "offset": float(-found.late)}


def _decide(video: np.ndarray, sound: np.ndarray, count: int) -> lse.Sync:
    return lse.decide(lse.distances(video[:count], sound[:count]))


def shift_sound(sound: np.ndarray, samples: int) -> np.ndarray:
    """The sound later by so many samples (earlier below 0), as long as before; silence where it was not recorded."""
    out = np.zeros_like(sound)
    kept = max(len(sound) - abs(samples), 0)
    out[max(samples, 0) : max(samples, 0) + kept] = sound[max(-samples, 0) : max(-samples, 0) + kept]
    return out


def shift_test(scorer: SyncScorer, frames: np.ndarray, boxes: np.ndarray, sound: np.ndarray, lead: float) -> np.ndarray:
    """Offset found less k, for every k of SHIFTS: int [21]. ``lead``: seconds the mouth is known to be ahead."""
    video, _ = scorer.points(frames, boxes, sound)
    count = lse.usable_windows(len(frames), len(sound))
    errors = []
    for k in SHIFTS:
        moved = shift_sound(sound, k * SAMPLES_PER_FRAME - round(lead * SAMPLE_RATE))
        errors.append(_decide(video, scorer.sound(moved), count).late - k)
    return np.array(errors)


@dataclass(frozen=True)
class Spoken:
    """A clip of the shift test: frames uint8 [F, H, W, 3], sound fp32 [S] or None, and what is known of its sync."""

    name: str
    frames: np.ndarray
    sound: np.ndarray | None
    known: float

    def faces(self) -> Faces:
        """By the engine's own tracker. Raises InputError where it finds no face."""
        track = track_face(self.frames, name=self.name)
        return Faces(track.boxes, track.present)


def corpus_clips(folder: Path) -> Iterator[Spoken]:
    """The validation clips of a rendered corpus (every 20th identity); ``known`` is the lead.

    Raises: InputError where no corpus is.
    """
    shards = sorted(Path(folder).glob("shard-[0-9]*"))
    if not shards:
        raise InputError(f"{folder}: expected a corpus of training.data.render (shard-00000, ...), found none")
    for shard in shards:
        frames, audio = (np.load(shard / f"{name}.npy", mmap_mode="r") for name in ("frames", "audio"))
        for row, line in enumerate((shard / "meta.jsonl").read_text().splitlines()):
            meta = json.loads(line)
            if meta["identity"] % VALIDATION_STRIDE == 0:
                name = f"identity {meta['identity']} take {meta['take']}"
                sound = np.array(audio[row]).astype(np.float32) / 32768
                yield Spoken(name, np.array(frames[row]), sound, float(meta["style"]["lead"]))


def case_clips(folder: Path) -> Iterator[Spoken]:
    """The true videos of a folder of held-out cases; ``known`` is the lead. Raises InputError where there are none."""
    cases = sorted(Path(folder).glob("case-*"))
    if not cases:
        raise InputError(f"{folder}: expected a folder of cases (case-00, ...), found none")
    for path in cases:
        clip = read_video(path / "target.mp4")
        with np.load(path / "truth.npz") as truth:
            lead = float(truth["style"][1]) if "style" in truth else USUAL_LEAD
        yield Spoken(path.name, clip.frames, clip.audio, lead)


def real_clips(folder: Path) -> Iterator[Spoken]:
    """Face crops of the real clips in which another scorer found a lag; ``known`` is that lag in frames."""
    if not (folder / "clips.csv").is_file():
        raise InputError(f"{folder}: expected a folder with clips.csv and clips, found none")
    with open(folder / "clips.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sync_lag"]]
    for row in rows:
        clip = read_face(folder / "clips" / row["file"], 128)
        yield Spoken(row["file"], clip.frames, clip.audio, int(row["sync_lag"]))


def _shares(errors: list[np.ndarray]) -> dict[str, float | int]:
    table = np.array(errors)
    found = np.abs(table) <= 1
    return {"clips": len(table), "right": round(float(found.mean()), 4),
            "clips_all_right": int(found.all(1).sum()), "median_error": float(np.median(table))}  # fmt: skip


def _test(a: argparse.Namespace, scorer: SyncScorer) -> dict[str, Any]:
    if a.real is not None:
        clips = real_clips(a.real)
    else:
        clips = corpus_clips(a.corpus) if a.corpus is not None else case_clips(a.cases)
    errors, out_of_step, left_out = [], 0, 0
    for clip in clips:
        try:
            faces = clip.faces()
            reason = refusal(clip.frames, faces, clip.sound)
        except InputError as e:
            reason = str(e)
        if reason is not None or clip.sound is None:
            print(f"{clip.name}: left out, {reason}")
            left_out += 1
            continue
        error = shift_test(scorer, clip.frames, faces.boxes, clip.sound, clip.known if a.real is None else 0.0)
        told = f"{np.mean(np.abs(error) <= 1):.0%} right, median error {np.median(error):+g}"
        if a.real is not None and abs(clip.known) > IN_STEP:
            out_of_step += 1
            told += f"; another scorer finds it {clip.known:+.0f} frames out of step: not counted"
        else:
            errors.append(error)
        print(f"{clip.name}: {told}", flush=True)
    if not errors:
        raise InputError("sync: expected clips to test, found none")
    kind = "real" if a.real is not None else "corpus" if a.corpus is not None else "cases"
    return {"set": kind, "shifts": len(SHIFTS), "left_out": left_out, "out_of_step": out_of_step, **_shares(errors)}


def _score(a: argparse.Namespace) -> dict[str, Any]:
    clip = read_video(a.video)
    track = track_face(clip.frames, name=str(a.video))
    faces = Faces(track.boxes, track.present)
    if (reason := refusal(clip.frames, faces, clip.audio)) is not None or clip.audio is None:
        raise InputError(f"{a.video}: no sync score, {reason}")
    if a.syncnet is None:
        return score_sync(clip.frames, faces, clip.audio)
    return score_syncnet(clip.frames, track.boxes, clip.audio, SyncNetScorer(a.syncnet))


def _record(path: Path, result: dict[str, Any]) -> None:
    card = json.loads(path.read_text()) if path.exists() else {}
    card.setdefault("figures", {})[result["set"]] = result
    path.write_text(json.dumps(card, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.sync", description="Lip-sync scores, shift test.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--video", type=Path, help="score one video")
    what.add_argument("--corpus", type=Path, help="shift test on a rendered corpus's validation clips")
    what.add_argument("--cases", type=Path, help="shift test on the true videos of held-out cases")
    what.add_argument("--real", type=Path, help="shift test on real clips")
    parser.add_argument("--syncnet", type=Path, help="with --video: SyncNet's weights, for LSE-C and LSE-D")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another trained scorer than the shipped one")
    parser.add_argument("--record", action="store_true", help="write the shift test's figures into the weights' card")
    a = parser.parse_args(arguments)
    try:
        if a.video is not None:
            result = _score(a)
        else:
            result = _test(a, SyncScorer(a.weights))
            print(f"{result['set']}: {result['right']:.1%} of {result['clips']} x {result['shifts']} offsets found")
            if a.record:
                _record(a.weights.with_suffix(".json"), result)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
