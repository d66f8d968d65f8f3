"""The scaling model: ``python -m bench.scaling --preset tavr_14b --gpus 1 2 4 8 64``. A model, not a measurement.

One denoising pass on each number of GPUs: FLOPs counted from the configuration, bytes by the formulas that the tests
hold to what the transport sends, and the schedule of ``runtime.parallel`` played on two clocks, one that computes and
one that sends. What is assumed is in the tables below and printed; rates measured on a machine replace it
(``--matmul-tflops``, ``--attention-tflops``). Decoding, encoding, files, and the broadcast of a pass's inputs (tens of
megabytes) are not part of it; normalisation and rotation count as part of the fraction that products reach.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch

from avatar_rt.config import FPS, PRESETS, AvatarConfig, DiTConfig, preset
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.runtime.hardware import PEAKS, Peaks
from avatar_rt.runtime.parallel import Mesh, split_rows
from avatar_rt.runtime.traffic import pass_bytes, reference_bytes

BF16 = 2  # bytes


@dataclass(frozen=True)
class Hardware(Peaks):
    """One GPU and its links, and what is assumed of them.

    Attributes:
        link_us, network_us: Latency of one operation between GPUs of one machine, and of two.
        matmul, attention, link: Fractions of the peaks that are reached.
    """

    link_us: float = 15.0
    network_us: float = 30.0
    matmul: float = 0.7
    attention: float = 0.6
    link: float = 0.8


HARDWARE = {name: Hardware(**asdict(peaks)) for name, peaks in PEAKS.items()}


@dataclass(frozen=True)
class Work:
    """What a pass works on: latent frames, patches of each, anchor rows, reference rows."""

    frames: int
    patches: int
    anchor: int
    reference: int

    def rows(self, cfg: DiTConfig) -> int:
        return self.frames * (self.patches + bool(cfg.motion_dim)) + self.anchor


def work_of(cfg: AvatarConfig, seconds: float) -> Work:
    """One chunk of a preset with a reference of so many seconds."""
    size = cfg.tokens_per_frame + bool(cfg.dit.motion_dim)
    reference = math.ceil(seconds * FPS / cfg.vae.temporal_stride) * size
    return Work(cfg.chunk.latents, cfg.tokens_per_frame, cfg.tokens_per_frame * cfg.dit.anchor, reference)


def projection_flops(cfg: DiTConfig, rows: int) -> int:
    """One of q, k, v and o of self-attention."""
    return 2 * rows * cfg.dim**2


def other_flops(cfg: DiTConfig, rows: int, video_rows: int, frames: int) -> int:
    """What a block multiplies besides self-attention's projections and products: text, speech, feed-forward."""
    c, text, heard = cfg.dim, cfg.text_len, cfg.audio_per_latent * frames
    total = 4 * rows * c**2 + 4 * text * c**2 + 4 * rows * text * c  # q and o, k and v, the two products
    if cfg.audio_dim:
        total += 4 * video_rows * c**2 + 4 * heard * c**2 + 4 * video_rows * 3 * cfg.audio_per_latent * c
    return total + 4 * rows * c * cfg.ffn_dim


def attention_flops(cfg: DiTConfig, rows: int, keys: int) -> int:
    """Both products of self-attention, all heads."""
    return 4 * rows * keys * cfg.dim


@dataclass
class Pass:
    """Seconds of one pass: in all, computing, sending, and waiting for what was sent."""

    mesh: Mesh
    seconds: float
    computing: float
    sending: float
    waiting: float
    bytes: dict[str, int]


class Clocks:
    """Two clocks: what computes, and what sends, one thing after another each."""

    def __init__(self) -> None:
        self.now = self.computing = self.sending = self.waiting = self._free = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.computing += seconds

    def send(self, seconds: float) -> float:
        """When what is sent from now on has arrived."""
        self._free = max(self._free, self.now) + seconds
        self.sending += seconds
        return self._free

    def wait(self, until: float) -> None:
        self.waiting += max(until - self.now, 0.0)
        self.now = max(until, self.now)


def model_pass(cfg: DiTConfig, work: Work, mesh: Mesh, hw: Hardware) -> Pass:
    """One pass on the rank with the most rows."""
    counts = split_rows(work.rows(cfg), mesh.world)
    rows, part = counts[0], sum(counts[: mesh.ulysses])
    parts = [sum(counts[r] for r in ranks) for ranks in mesh.ulysses_groups]
    video_rows = min(rows, work.frames * (work.patches + bool(cfg.motion_dim)))
    matmul, attention = hw.peak * hw.matmul, hw.peak * hw.attention
    near = mesh.ulysses <= hw.per_node
    ring_near = mesh.world <= hw.per_node

    def travel(size: float, close: bool) -> float:
        rate, delay = (hw.nvlink, hw.link_us) if close else (hw.network, hw.network_us)
        return delay * 1e-6 + size / (rate * hw.link)

    head_bytes = cfg.dim * BF16 // mesh.ulysses
    there = travel(rows * (mesh.ulysses - 1) * head_bytes, near)
    home = travel((part - rows) * head_bytes, near)
    project = projection_flops(cfg, rows) / matmul
    rest = other_flops(cfg, rows, video_rows, work.frames) / matmul
    clocks = Clocks()
    for _ in range(cfg.num_layers):
        arrived = []
        for _ in range(3):  # q, k, v: one travels while the next is computed
            clocks.compute(project)
            arrived.append(clocks.send(there) if mesh.ulysses > 1 else clocks.now)
        clocks.wait(arrived[0])
        over_reference = attention_flops(cfg, part, work.reference) / mesh.ulysses / attention
        if mesh.ring == 1:
            clocks.compute(over_reference)
        clocks.wait(max(arrived))
        for turn in range(mesh.ring):
            held = parts[-turn % mesh.ring]
            coming = clocks.send(travel(2 * held * head_bytes, ring_near)) if turn + 1 < mesh.ring else 0.0
            clocks.compute(attention_flops(cfg, part, held) / mesh.ulysses / attention)
            clocks.compute(over_reference / mesh.ring if mesh.ring > 1 else 0.0)
            clocks.wait(coming)
        if mesh.ulysses > 1:
            clocks.wait(clocks.send(home))
        clocks.compute(project + rest)
    sent = pass_bytes(cfg, mesh, frames=work.frames, patches=work.patches, anchor=work.anchor, itemsize=BF16)
    if mesh.world > 1:
        clocks.wait(clocks.send(travel(sent["all_gather"], ring_near)))
    return Pass(mesh, clocks.now, clocks.computing, clocks.sending, clocks.waiting, sent)


def weights_bytes(cfg: DiTConfig) -> int:
    with torch.device("meta"):
        return BF16 * sum(p.numel() for p in VideoRefDiT(cfg).parameters())


def kept_bytes(cfg: DiTConfig, work: Work, ulysses: int) -> int:
    """Keys and values of a rank's heads for the whole reference."""
    return 2 * cfg.num_layers * work.reference * cfg.dim * BF16 // ulysses


def best_pass(cfg: DiTConfig, work: Work, gpus: int, hw: Hardware) -> tuple[Pass, bool]:
    """The fastest mesh of so many GPUs among those whose memory suffices, or of all if none does; and whether it does.

    Raises: InputError when there are more GPUs than rows.
    """
    degrees = [u for u in range(1, gpus + 1) if gpus % u == 0 and cfg.num_heads % u == 0]
    if gpus < 1 or work.rows(cfg) < gpus:
        raise InputError(f"gpus: expected 1 to {work.rows(cfg)}, got {gpus}")
    room = 0.9 * hw.memory - weights_bytes(cfg)
    fits = [u for u in degrees if kept_bytes(cfg, work, u) <= room]
    found = [model_pass(cfg, work, Mesh(u, gpus // u, 0, gpus), hw) for u in fits or degrees]
    return min(found, key=lambda p: p.seconds), bool(fits)


def table(cfg: AvatarConfig, work: Work, gpus: list[int], hw: Hardware) -> list[dict[str, float | int | str]]:
    """A row for each number of GPUs; speed-up and efficiency are over one GPU of the same model."""
    alone = best_pass(cfg.dit, work, 1, hw)[0].seconds
    rows: list[dict[str, float | int | str]] = []
    for n in gpus:
        p, fits = best_pass(cfg.dit, work, n, hw)
        once = reference_bytes(cfg.dit, p.mesh, rows=work.reference, itemsize=BF16)
        rows.append({
            "gpus": n, "ulysses": p.mesh.ulysses, "ring": p.mesh.ring, "pass_ms": p.seconds * 1e3,
            "compute_ms": p.computing * 1e3, "send_ms": p.sending * 1e3, "exposed_ms": p.waiting * 1e3,
            "hidden": 1 - p.waiting / p.sending if p.sending else 1.0, "speed_up": alone / p.seconds,
            "efficiency": alone / p.seconds / n, "bytes_per_pass": sum(p.bytes.values()),
            "reference_bytes_once": sum(once.values()),
            "reference_kept_bytes": kept_bytes(cfg.dit, work, p.mesh.ulysses), "fits": fits,
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, float | int | str]]) -> None:
    head = ["GPUs", "Ulysses x ring", "pass ms", "sending ms", "of it hidden", "share waiting", "x one", "efficiency",
            "GB sent a pass", "GB of reference kept", "fits"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for r in rows:
        cells = [
            r["gpus"], f"{r['ulysses']} x {r['ring']}", f"{r['pass_ms']:.1f}", f"{r['send_ms']:.1f}",
            f"{r['hidden']:.0%}", f"{float(r['exposed_ms']) / float(r['pass_ms']):.1%}", f"{r['speed_up']:.2f}",
            f"{r['efficiency']:.0%}", f"{float(r['bytes_per_pass']) / 1e9:.2f}",
            f"{float(r['reference_kept_bytes']) / 1e9:.1f}", "yes" if r["fits"] else "no",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tavr_14b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="h100")
    parser.add_argument("--reference-seconds", type=float, default=10.0)
    parser.add_argument("--matmul-tflops", type=float, help="rate of matrix products measured on one GPU")
    parser.add_argument("--attention-tflops", type=float, help="rate of attention measured on one GPU")
    args = parser.parse_args(argv)
    cfg, hw = preset(args.preset), HARDWARE[args.hardware]
    for name in ("matmul", "attention"):
        measured = getattr(args, f"{name}_tflops")
        hw = hw if measured is None else replace(hw, **{name: measured * 1e12 / hw.peak})
    work = work_of(cfg, args.reference_seconds)
    try:
        rows = table(cfg, work, args.gpus, hw)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    g, r = work.rows(cfg.dit), work.reference
    print(f"Model, not a measurement: {cfg.name}, one pass, G={g}, R={r}, bf16, {args.hardware}: {asdict(hw)}")
    show(rows)
    print(json.dumps({"preset": cfg.name, "hardware": args.hardware, "assumed": asdict(hw), "g": g, "r": r,
                      "rows": rows}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
