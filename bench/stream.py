"""Speed of a stream, end to end: ``python -m bench.stream [--bundle DIR] [--threads N] [--quick] [--store]``.

The same reference, sound, noise and sampling through the engine's own ``generate``, through plain eager torch and
through ``torch.compile`` (``bench.baseline``), sound to finished file. Each is held against an fp32 run first: one that
errs more than twice as much as plain torch in the engine's dtype posts no number (or, in fp32, more than LEAST). Then
they take turns, every second round backwards; ratios are medians over rounds. CPU time counts every thread of the
process, so that a busy machine cannot stretch it.
The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avatar_rt.config import FPS, SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.media.audio import normalise_loudness, read_audio
from avatar_rt.media.writer import VideoWriter
from avatar_rt.pipeline.likeness import Likeness, Performance
from avatar_rt.pipeline.schedule import make_schedule
from avatar_rt.session import Reference
from bench.baseline import Plain
from bench.harness import hardware
from bench.report import RESULTS

SAMPLES = Path(__file__).parent.parent / "avatar_rt" / "samples"
LIMIT = 2.0  # of plain torch's own error
LEAST = 0.1  # grey levels: what rounding to whole ones may do by itself


@dataclass
class Marks:
    """Wall and CPU clocks at the start, then at every chunk that is in the file, with its frames."""

    at: list[tuple[float, float, int]] = field(default_factory=list)

    def __call__(self, done: int, total: int = 0) -> None:
        self.at.append((time.perf_counter(), time.process_time(), done))

    def row(self) -> dict[str, float]:
        (wall, cpu, _), *chunks = self.at
        frames, last = chunks[-1][2], chunks[-1]
        lengths = np.diff([c[0] for c in self.at])[1:] if len(chunks) > 1 else np.array([chunks[0][0] - wall])
        steady = frames - chunks[0][2]
        return {
            "frames": frames,
            "first_s": chunks[0][0] - wall,
            "first_cpu_s": chunks[0][1] - cpu,
            "chunk_p50_s": float(np.median(lengths)),
            "chunk_p95_s": float(np.quantile(lengths, 0.95)),
            "wall_s": last[0] - wall,
            "cpu_s": last[1] - cpu,
            "fps": frames / (last[0] - wall),
            "fps_cpu": frames / (last[1] - cpu),
            "steady_fps": steady / (last[0] - chunks[0][0]) if steady else frames / (last[0] - wall),
            "real_time_factor": (last[0] - wall) * FPS / frames,
        }


class Noting:
    """A performance whose takes are noted."""

    def __init__(self, performance: Performance, takes: list[Any]) -> None:
        self.performance, self.takes = performance, takes
        self.pictures, self.finer = performance.pictures, performance.finer

    def take(self, told: torch.Tensor, before: torch.Tensor | None = None) -> Any:
        self.takes.append(self.performance.take(told, before))
        return self.takes[-1]


class Following(Noting):
    """A performance that gives the takes of another, one after another, whatever it is told."""

    def __init__(self, performance: Performance, takes: list[Any]) -> None:
        super().__init__(performance, takes)
        self.count = 0

    def take(self, told: torch.Tensor, before: torch.Tensor | None = None) -> Any:
        self.count += 1
        return self.takes[self.count - 1]


class Request:
    """One bundle, one person, one speech, in a folder of its own."""

    def __init__(self, bundle: Path | None, seconds: float, folder: Path, seed: int, steps: int | None) -> None:
        self.folder, self.bundle, self.seed = folder, bundle, seed
        self.engine = AvatarEngine(bundle)
        self.reference = self.engine.prepare(SAMPLES / "reference.mp4")
        spoken = read_audio(SAMPLES / "speech.wav").samples
        samples = np.tile(spoken, 1 + int(seconds * SAMPLE_RATE) // len(spoken))[: round(seconds * SAMPLE_RATE)]
        self.speech = folder / "speech.wav"
        with wave.open(str(self.speech), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
        self.sound = read_audio(self.speech)
        self.wave = normalise_loudness(self.sound.samples, SAMPLE_RATE)
        self.options: dict[str, Any] = {"seed": seed} | ({} if steps is None else {"steps": steps})
        cfg = self.engine.config
        sampling = cfg.sampling if steps is None else type(cfg.sampling)(**{**vars(cfg.sampling), "steps": steps})
        self.schedule = make_schedule(sampling, cfg.chunk, seed, has_text=False)
        self.total = -(-len(self.wave) * FPS // SAMPLE_RATE)

    def ours(self) -> Marks:
        marks = Marks()
        self.engine.generate(self.reference, self.speech, self.folder / "ours.mp4", progress=marks, **self.options)
        return marks

    def plain(self, system: Plain, name: str) -> Marks:
        marks, done, cfg = Marks(), 0, self.engine.config
        size = (cfg.height * cfg.output_scale, cfg.width * cfg.output_scale)
        sound = (self.sound.original, self.sound.original_rate)
        with VideoWriter(self.folder / f"{name}.mp4", size, FPS, audio=sound) as writer:
            marks(0)
            for frames in system.frames(self.reference, self.wave, self.schedule, self.total):
                writer.write(frames)
                done += len(frames)
                marks(done)
        return marks

    def session_frames(
        self, engine: AvatarEngine, reference: Reference, likeness: Likeness | None
    ) -> Iterator[np.ndarray]:
        session = engine.session(reference, overlap=False, **self.options)
        session.likeness = likeness
        session.push_audio(self.wave)
        session.end_audio()
        return session.frames()

    def errors(self, systems: dict[str, Plain], chunks: int) -> dict[str, dict[str, float]]:
        """RMS and worst difference to an fp32 run in plain torch, in grey levels, over the first chunks.

        All have the guides that fp32 chose: where two mouths of the reference fit next to equally well, rounding would
        decide which of them a frame gets.
        """
        exact, takes = AvatarEngine(self.bundle, dtype=torch.float32), list[Any]()
        known, wanted = exact.prepare(SAMPLES / "reference.mp4"), exact.config.sampling.likeness

        def led(engine: AvatarEngine, reference: Reference, kind: Callable[..., Any]) -> Likeness | None:
            own = engine.likeness(reference, None, wanted)
            return None if own is None else replace(own, performance=kind(own.performance, takes))

        told = self.wave, self.schedule, self.total
        truth = Plain(exact, dtype=torch.float32).frames(known, *told, led(exact, known, Noting))
        following = led(self.engine, self.reference, Following)
        runs: dict[str, Iterator[np.ndarray]] = {"ours": self.session_frames(self.engine, self.reference, following)}
        for name, system in systems.items():
            runs[name] = system.frames(self.reference, *told, led(self.engine, self.reference, Following))
        squares: dict[str, list[float]] = {name: [] for name in runs}
        worst = dict.fromkeys(runs, 0.0)
        for _, true in zip(range(chunks), truth, strict=False):
            for name, run in runs.items():
                difference = next(run).astype(np.float64) - true
                squares[name] += (difference**2).mean((1, 2, 3)).tolist()
                worst[name] = max(worst[name], float(np.abs(difference).max()))
        return {n: {"rms": float(np.mean(s)) ** 0.5, "worst": worst[n]} for n, s in squares.items()}


def measure(request: Request, systems: dict[str, Plain], rounds: int) -> dict[str, list[dict[str, float]]]:
    """A row per system and round, in turns."""
    calls: dict[str, Callable[[], Marks]] = {"ours": request.ours}
    calls |= {name: lambda name=name, s=s: request.plain(s, name) for name, s in systems.items()}  # type: ignore[misc]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            rows[name].append(calls[name]().row())
    return rows


def middle(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rows) for key in rows[0]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        request = Request(args.bundle, args.seconds, Path(folder), 1, args.steps)
        systems = {"eager": Plain(request.engine)}
        if not args.no_compile:
            systems["compiled"] = Plain(request.engine, compiled=True)
        machine = hardware("cpu")
        cfg = request.engine.config
        print(f"{machine['name']}, {args.threads} thread(s), torch {machine['torch']}, commit {machine['commit']}")
        print(f"{cfg.name} {cfg.height}x{cfg.width}, {len(request.schedule.times) - 1} steps, "
              f"{len(request.schedule.passes)} passes, {request.total} frames, load {machine['load']:.1f}")  # fmt: skip
        errors = request.errors(systems, args.check_chunks)
        limit = max(LIMIT * errors["eager"]["rms"], LEAST)
        refused = [n for n, e in errors.items() if not e["rms"] <= limit]
        rows = measure(request, {n: s for n, s in systems.items() if n not in refused}, args.rounds)
    found = {name: {**middle(r), **errors[name]} for name, r in rows.items() if name not in refused}
    ratios = {}
    for name in found:
        if name != "ours" and "ours" in found:
            pairs = list(zip(rows[name], rows["ours"], strict=True))
            ratios[name] = {c: statistics.median(a[c] / b[c] for a, b in pairs) for c in ("cpu_s", "wall_s")}
    show(found, ratios, errors, refused, limit)
    ours = found.get("ours")
    return {
        "bench": "stream", "machine": machine, "threads": args.threads, "config": cfg.name, "quick": args.quick,
        "size": [cfg.height, cfg.width], "weights": request.engine.bundle.weights_hash[:12], "rounds": args.rounds,
        "seconds": args.seconds, "systems": found, "ratios": ratios, "refused": refused, "error_limit": limit,
        "first_over_chunk": ours["first_s"] / ours["chunk_p50_s"] if ours else None,
    }  # fmt: skip


def show(
    found: dict[str, dict[str, float]],
    ratios: dict[str, dict[str, float]],
    errors: dict[str, dict[str, float]],
    refused: list[str],
    limit: float,
) -> None:
    heads = ("fps", "fps CPU", "first s", "P50 s", "P95 s", "RTF", "x CPU", "x wall", "rms error")
    print(f"{'':10}" + "".join(f"{h:>10}" for h in heads))
    for name, r in found.items():
        cells = [r["fps"], r["fps_cpu"], r["first_s"], r["chunk_p50_s"], r["chunk_p95_s"], r["real_time_factor"]]
        over = [ratios[name]["cpu_s"], ratios[name]["wall_s"]] if name in ratios else [1.0, 1.0]
        print(f"{name:10}" + "".join(f"{c:>10.2f}" for c in [*cells, *over, r["rms"]]))
    for name in refused:
        print(f"{name:10}  no figure: rms error {errors[name]['rms']:.3f} is above {limit:.3f}")
    print("x: its time over ours, median of rounds", flush=True)


def save(document: dict[str, Any]) -> Path:
    """bench/results/stream-<hardware>-<threads>.json: the machine beside the result."""
    slug = re.sub(r"[^a-z0-9]+", "-", document["machine"]["name"].lower()).strip("-")
    path = RESULTS / f"stream-{slug}-{document['size'][0]}px-{document['threads']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": document["machine"], "result": document}, indent=1) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description="Speed of a stream, end to end.")
    parser.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="solver steps (default: the bundle's)")
    parser.add_argument("--check-chunks", type=int, default=2, help="chunks held against fp32 (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which compiles for minutes")
    parser.add_argument("--quick", action="store_true", help="1.2 s of speech, 2 steps, one round, no torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the document there")
    parser.add_argument("--store", action="store_true", help="write bench/results/stream-<hardware>-<size>-<threads>")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds, args.steps, args.rounds, args.check_chunks, args.no_compile = 1.2, 2, 1, 1, True
    if args.check_chunks < 2 and not args.no_compile:
        parser.error("--check-chunks: torch.compile needs 2 or more, or it compiles a later chunk while the clock runs")
    if args.store and (args.quick or args.no_compile or args.steps):
        parser.error("--store needs a whole run: no --quick, --no-compile or --steps")
    document = run(args)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.store:
        save(document)
    print(json.dumps(document))
    return 1 if "ours" in document["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
