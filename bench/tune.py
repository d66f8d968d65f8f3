"""Searches how the kernels run best on this machine: ``python -m bench.tune [--bundle DIR] [--out FILE]``.

One setting after another, each candidate in turns with the best so far on the shipped person: a solver step and a
chunk's decoding. A candidate must err at most twice as much as plain modules in the same dtype (against fp32), and win
by more than 3 % of the least time of its rounds, twice: less is noise. The result is a tuning file that
``AvatarEngine(tuning=FILE)`` reads; as ``tuning.json`` in a bundle's directory it is found there. On a GPU the tiles of
the Triton attention are searched too. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatar_rt.engine import AvatarEngine
from avatar_rt.models.dit import VideoRefDiT, with_masks
from avatar_rt.models.guided import GuidedDiT, refuses_guided
from avatar_rt.models.streamed import StreamedVAE, refuses_streamed
from avatar_rt.pipeline.denoise import Conditions, _guidance
from avatar_rt.pipeline.reference import pack_cache
from avatar_rt.pipeline.schedule import make_schedule
from avatar_rt.runtime.tuning import NAME, Settings, Tuning, device_name, save_tuning, versions
from bench.report import machine
from bench.stream import SAMPLES
from tests.tolerance import typical

GAIN = 0.97  # a candidate's time over the best one's, below which it is taken
LIMIT = 2.0


class Workload:
    """One solver step and one chunk's decoding on the shipped person, under any settings."""

    def __init__(self, bundle: Path | None, device: str) -> None:
        self.engine = AvatarEngine(bundle, device=device)
        exact = AvatarEngine(bundle, device=device, dtype=torch.float32)
        cfg, (h, w) = self.engine.config, self.engine.config.latent_size
        g = torch.Generator().manual_seed(0)
        self.frames = cfg.chunk.latents
        place = self.engine.device
        z = torch.randn(1, cfg.dit.latent_channels, self.frames, h, w, generator=g).to(place)
        self.latents = with_masks(z, cfg.dit, 0, 0)
        self.t = torch.full((1, self.frames), 0.6, device=place)
        self.motion = None
        if cfg.dit.motion_dim:
            self.motion = torch.randn(1, self.frames, cfg.dit.motion_dim, generator=g).to(place)
        per = cfg.dit.audio_per_latent
        self.audio = torch.randn(1, per * (self.frames - 1) + 1, cfg.dit.audio_dim, generator=g).to(place)
        self.schedule = make_schedule(cfg.sampling, cfg.chunk, 0, has_text=False)
        self.dit = getattr(self.engine.dit, "dit", self.engine.dit)
        self.vae = getattr(self.engine.vae, "vae", self.engine.vae)
        with torch.inference_mode():
            self.reference = self.engine.prepare(SAMPLES / "reference.mp4")
            known = exact.prepare(SAMPLES / "reference.mp4")
            self.cache = pack_cache(self.reference.cache)
            self.z = self.vae.denormalize(known.context.latents[:, : cfg.dit.latent_channels, : self.frames].clone())
            modules = getattr(exact.dit, "dit", exact.dit)
            self.truth = [*self._step(modules, exact, known.cache)(), self.vae.decode_step(self.z, None)[0]]
            self.limits = [LIMIT * e for e in self.errors(dataclasses.replace(Settings(), batched=False))[:-1]]
        self.limits.append(LIMIT * 0.002)  # of the picture's -1..1: half of what rounding to 8 bits does

    def _step(self, dit: Any, engine: AvatarEngine, cache: Any) -> Callable[[], tuple[Tensor, ...]]:
        empty, scene = engine.embed_text(), self.reference.scene
        given = Conditions(scene, self.audio, empty, empty)
        anchor = with_masks(scene.latent, engine.config.dit, scene.kept, 0)
        call = _guidance(dit, self.schedule, self.schedule.passes, anchor, self.frames, lambda: cache, given)
        return lambda: tuple(x for x in call(self.latents, self.t, self.motion, self.motion) if x is not None)

    def calls(self, s: Settings) -> list[Callable[[], tuple[Tensor, ...]]]:
        """A step and a decoding under the settings, which stay in force."""
        AvatarEngine._apply(s)
        dit: VideoRefDiT | GuidedDiT = (
            GuidedDiT(self.dit) if s.batched and refuses_guided(self.dit) is None else self.dit
        )
        vae: Any = StreamedVAE(self.vae) if s.recorded_decoder and refuses_streamed(self.vae) is None else self.vae
        return [self._step(dit, self.engine, self.cache), lambda: (vae.decode_step(self.z, None)[0],)]

    def errors(self, s: Settings) -> list[float]:
        got = [x for call in self.calls(s) for x in call()]
        return [typical(g, t.double()) for g, t in zip(got, self.truth, strict=True)]

    def seconds(self, s: Settings, calls: list[Callable[[], tuple[Tensor, ...]]]) -> float:
        """Wall time of a chunk: all its steps and its decoding."""
        AvatarEngine._apply(s)
        total = 0.0
        for call, times in zip(calls, (len(self.schedule.times) - 1, 1), strict=True):
            started = time.perf_counter()
            call()
            if self.engine.device.type == "cuda":
                torch.cuda.synchronize(self.engine.device)
            total += times * (time.perf_counter() - started)
        return total


def candidates(device: torch.device, cores: int) -> Iterator[tuple[str, list[Any]]]:
    """Each setting with the values to try."""
    if device.type == "cuda":
        tiles = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        yield "attention_tiles", [(), *tiles]
        return
    yield "batched", [True, False]
    yield "recorded_decoder", [True, False]
    yield "threads", list(range(1, cores + 1))
    yield "linear_rows", [48, 24, 96, 192]
    yield "norm_rows", [32, 8, 128]
    yield "spins", [400, 0, 4000]


def least(work: Workload, settings: list[Settings], rounds: int) -> list[float]:
    """Least seconds of each of several settings, in turns: what a busy machine adds, some round goes without."""
    calls = [work.calls(s) for s in settings]
    best = [float("inf")] * len(settings)
    for turn in range(rounds):
        order = range(len(settings)) if turn % 2 == 0 else reversed(range(len(settings)))
        for i in order:
            best[i] = min(best[i], work.seconds(settings[i], calls[i]))
    return best


def search(work: Workload, rounds: int, cores: int) -> tuple[Settings, list[dict[str, Any]]]:
    """The best settings, and a row for each candidate with its time over the best one's and its error."""
    best = dataclasses.replace(Settings(), threads=torch.get_num_threads())
    rows = []
    for name, values in candidates(work.engine.device, cores):
        for value in values:
            trial = dataclasses.replace(best, **{name: value})
            row: dict[str, Any] = {"setting": name, "value": value}
            rows.append(row)
            if trial == best:
                continue
            try:
                errors = work.errors(trial)
                if not all(e <= limit for e, limit in zip(errors, work.limits, strict=True)):
                    row["refused"] = f"errors {errors} are above {work.limits}"
                    continue
                old, new = least(work, [best, trial], rounds)
                if new < GAIN * old:  # a win has to be won twice: on a busy machine one is luck
                    again, new_again = least(work, [best, trial], 2 * rounds)
                    old, new = (again, new_again) if new_again / again > new / old else (old, new)
            except Exception as e:  # what does not compile or fit on this device is no candidate
                row["refused"] = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
                continue
            row |= {"over_best": new / old, "chunk_s": new, "taken": new < GAIN * old}
            if row["taken"]:
                best = trial
            print(f"  {name:18}{value!s:>18}  {new / old:6.3f} of the best's time{'  taken' if row['taken'] else ''}",
                  flush=True)  # fmt: skip
    return best, rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="The fastest settings of this machine.")
    parser.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="most threads to try")
    parser.add_argument("--out", type=Path, help=f"tuning file (default: {NAME} in the bundle's directory)")
    args = parser.parse_args(argv)
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"load {busy:.1f}: something else runs here, and what wins by little may have won by luck", flush=True)
    work = Workload(args.bundle, args.device)
    device = device_name(work.engine.device)
    print(f"{device}, torch {torch.__version__}, packages {versions()}", flush=True)
    with torch.inference_mode():
        best, rows = search(work, args.rounds, args.cores)
        start = dataclasses.replace(Settings(), threads=1)
        before, after = least(work, [start, best], args.rounds)
    path = args.out or work.engine.bundle.path / NAME
    found = {"rows": rows, "chunk_s": {"defaults, one thread": before, "chosen": after}, "load": os.getloadavg()[0]}
    save_tuning(path, Tuning(best, device, versions(), str(machine()["commit"])), found)
    print(f"chosen: {best}; a chunk takes {after:.3f} s, {before:.3f} s with the defaults on one thread; in {path}")
    print(json.dumps({"bench": "tune", "machine": machine(), "settings": dataclasses.asdict(best), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
