"""Memory and step time of a training run, from a written model: ``python -m training.estimate --preset tavr_14b``.

Nothing runs: FLOPs, kept bytes and parameters come from training/cost.py, the rest from the rules below.

- Weights are sharded over all GPUs (FSDP2): fp32 master weights, gradients, Muon's momentum, AdamW's two moments, the
  average; two blocks at a time are gathered in the compute dtype, and their gradients wait in it to be reduced.
- ``--ulysses`` GPUs share a clip: rows outside of attention, heads inside; kept bytes and FLOPs are divided by it.
- Compute: products at ``linear`` of the peak, attention at ``attention`` of it; norms, gates and activations move what
  autograd keeps three times forward and six times backward, at ``memory`` of the memory's bandwidth.
- FSDP gathers the weights twice (forward, backward) and scatters fp32 gradients once, for every micro-step; what enters
  a node is shared by its network cards, then spread over NVLink. It overlaps with compute; only what is longer shows.
- Ulysses exchanges q, k, v and the output of every self-attention, forward, backward and recomputed; nothing hides it.
- A block runs about 600 kernels in a step (counted; 120 more where it runs forward again), and none starts sooner than
  5 microseconds after the one before it: what is longer than compute shows. Graphs or a compiler take that away.
- Muon's matrices are dealt out over the GPUs, gathered and returned in the compute dtype; five Newton-Schulz
  iterations run at ``linear`` of the peak.

Peak rates are the makers', in ``avatar_rt.runtime.hardware``. The efficiencies are defaults of ours, not measured on
these machines: give your own after a first run. Encoders are not in it: latents, speech features and text embeddings
come encoded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from avatar_rt.config import AvatarConfig, preset
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.runtime.hardware import PEAKS, Peaks
from training.cost import Load, Parameters, count_parameters, load_of, saved_bytes, step_flops

FP32 = 4
RESERVED = 2e9  # bytes: the driver's context, the communicators' buffers
FRAGMENTED = 0.05  # of what torch's allocator holds
KERNELS, KERNELS_AGAIN, LAUNCH = 600, 120, 5e-6  # of a block in a step, where it runs forward again; seconds


@dataclass(frozen=True)
class Gpu(Peaks):
    """One GPU as its maker describes it, and which share of that is reached."""

    linear: float = 0.65
    attention: float = 0.50
    memory_share: float = 0.80
    link_share: float = 0.75


GPUS = {name: Gpu(**asdict(peaks)) for name, peaks in PEAKS.items()}


@dataclass(frozen=True)
class Layout:
    """How a step is spread.

    Attributes:
        gpus: all of them; ulysses: those that share a clip by sequence and heads; accumulate: micro-steps of a step.
        recompute: blocks keep their input only and run forward again in the backward.
        itemsize: bytes of the compute dtype.
    """

    gpus: int
    ulysses: int
    accumulate: int = 1
    recompute: bool = True
    itemsize: int = 2
    average: bool = True


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU by purpose, seconds of a step by cause, and what follows."""

    memory: dict[str, float]
    seconds: dict[str, float]
    sent: dict[str, float]
    flops: float
    step: float
    mfu: float
    samples_per_day: float

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def check_layout(cfg: AvatarConfig, layout: Layout, gpu: Gpu) -> None:
    """Raises InputError where the GPUs cannot be shared out so."""
    n, u = layout.gpus, layout.ulysses
    if n < 1 or (n > gpu.per_node and n % gpu.per_node):
        raise InputError(f"gpus: expected 1..{gpu.per_node} or a multiple of {gpu.per_node}, got {n}")
    if u < 1 or n % u or cfg.dit.num_heads % u or u > gpu.per_node:
        raise InputError(
            f"ulysses: expected a divisor of {n} GPUs and of {cfg.dit.num_heads} heads, at most {gpu.per_node}, got {u}"
        )
    if layout.accumulate < 1:
        raise InputError(f"accumulate: expected 1 or more, got {layout.accumulate}")


def memory_of(cfg: AvatarConfig, load: Load, layout: Layout, size: Parameters) -> dict[str, float]:
    """Bytes on one GPU."""
    n, item = layout.gpus, layout.itemsize
    outer = size.total - cfg.dit.num_layers * size.block  # gathered once, kept through the step
    saved = saved_bytes(cfg.dit, load, item)
    whole = n == 1  # nothing is gathered; autocast's copies of one block's weights live as long as it runs
    out = {
        "weights": FP32 * size.total / n,
        "gradients": FP32 * size.total / n,
        "muon": FP32 * size.muon / n,
        "adamw": 2 * FP32 * size.adamw / n,
        "average": FP32 * size.total / n if layout.average else 0.0,
        "gathered weights": item * ((1 if whole else 2) * size.block + outer),
        "gathered gradients": 0.0 if whole else (item + FP32) * size.block + item * outer,
        "activations": saved.total(cfg.dit.num_layers, layout.recompute) / layout.ulysses,
    }
    return out | {"allocator, driver": FRAGMENTED * sum(out.values()) + RESERVED}


def sent_of(cfg: AvatarConfig, load: Load, layout: Layout, size: Parameters) -> dict[str, float]:
    """Bytes that one GPU receives in a step, by collective."""
    n, u, item, dit = layout.gpus, layout.ulysses, layout.itemsize, cfg.dit
    rows = load.batch * (load.generated(dit) * dit.num_layers + load.reference(dit) * max(dit.num_layers - 1, 0))
    passes = (3 if layout.recompute else 2) * layout.accumulate
    share = (n - 1) / n
    return {
        "gather weights": 2 * layout.accumulate * share * item * size.total,
        "scatter gradients": layout.accumulate * share * FP32 * size.total,
        "ulysses": passes * 4 * rows / u * dit.dim * item * (u - 1) / u,
        "muon": 2 * share * item * size.muon,
    }


def compute_seconds(cfg: AvatarConfig, load: Load, layout: Layout, gpu: Gpu) -> dict[str, float]:
    """Seconds of one micro-step's arithmetic on one GPU."""
    linear, attention = step_flops(cfg.dit, load).parts(layout.recompute)
    saved = saved_bytes(cfg.dit, load, layout.itemsize).total(cfg.dit.num_layers, recompute=False)
    moved = (12 if layout.recompute else 9) * saved
    u = layout.ulysses
    return {
        "products": linear / u / (gpu.peak * gpu.linear),
        "attention": attention / u / (gpu.peak * gpu.attention),
        "norms, gates": moved / u / (gpu.memory_rate * gpu.memory_share),
    }


def estimate(cfg: AvatarConfig, load: Load, layout: Layout, gpu: Gpu) -> Estimate:
    """A step of ``layout.gpus`` / ``layout.ulysses`` * ``accumulate`` * ``load.batch`` clips."""
    check_layout(cfg, layout, gpu)
    size, n = count_parameters(cfg.dit), layout.gpus
    compute = compute_seconds(cfg, load, layout, gpu)
    seconds = {k: v * layout.accumulate for k, v in compute.items()}
    sent = sent_of(cfg, load, layout, size)
    nodes = -(-n // gpu.per_node)
    here = min(n, gpu.per_node)

    def over_all(received: float) -> float:
        """What every GPU receives in full: over NVLink, and into each node over all of its cards."""
        inside = received / (gpu.nvlink * gpu.link_share)
        across = received * (nodes - 1) / max(nodes - 1 / here, 1) / (here * gpu.network * gpu.link_share)
        return max(inside, across)

    fsdp = over_all(sent["gather weights"] + sent["scatter gradients"])
    kernels = cfg.dit.num_layers * (KERNELS + KERNELS_AGAIN * layout.recompute) * layout.accumulate
    seconds["launches beyond compute"] = max(0.0, kernels * LAUNCH - sum(seconds.values()))
    seconds["ulysses"] = sent["ulysses"] / (gpu.nvlink * gpu.link_share)
    seconds["fsdp beyond compute"] = max(0.0, fsdp - sum(seconds.values()))
    touched = FP32 * (size.total * (3 + 3 * layout.average) + 3 * size.muon + 5 * size.adamw) / n
    seconds["optimiser"] = (
        size.orthogonalise / n / (gpu.peak * gpu.linear) + over_all(sent["muon"])
        + touched / (gpu.memory_rate * gpu.memory_share)
    )  # fmt: skip
    step = sum(seconds.values())
    clips = n // layout.ulysses * layout.accumulate * load.batch
    flops = step_flops(cfg.dit, load).model * n / layout.ulysses * layout.accumulate
    memory = memory_of(cfg, load, layout, size)
    return Estimate(memory, seconds, sent, flops, step, flops / (step * n * gpu.peak), clips * 86_400 / step)


def smallest_ulysses(cfg: AvatarConfig, load: Load, layout: Layout, gpu: Gpu) -> Layout:
    """The layout with as few GPUs to a clip as its memory allows; as many as there are where none is enough."""
    fitting = [u for u in range(1, min(layout.gpus, gpu.per_node) + 1)
               if layout.gpus % u == 0 and cfg.dit.num_heads % u == 0]  # fmt: skip
    size = count_parameters(cfg.dit)
    for u in fitting:
        chosen = Layout(**{**asdict(layout), "ulysses": u})
        if sum(memory_of(cfg, load, chosen, size).values()) <= gpu.memory:
            break
    return chosen


def report(cfg: AvatarConfig, load: Load, layout: Layout, gpu: Gpu, found: Estimate) -> str:
    size, dit = count_parameters(cfg.dit), cfg.dit
    lines = [
        f"{cfg.name}: {size.total / 1e9:.2f} G parameters ({size.muon / 1e9:.2f} by Muon), {dit.num_layers} blocks of "
        f"{dit.dim}; {load.frames} latent frames, G = {load.generated(dit)} rows, R = {load.reference(dit)} rows",
        f"{layout.gpus} x {gpu.name}: a clip on {layout.ulysses} GPU(s), {layout.gpus // layout.ulysses} group(s) x "
        f"{load.batch} clip(s) x {layout.accumulate} micro-step(s), "
        + ("blocks recomputed" if layout.recompute else "nothing recomputed"),
        "",
        "memory of a GPU, GB",
        *(f"  {name:<25}{value / 1e9:>9.2f}" for name, value in found.memory.items()),
        f"  {'all':<25}{found.bytes / 1e9:>9.2f} of {gpu.memory / 1e9:.0f}"
        + ("" if found.bytes <= gpu.memory else ": DOES NOT FIT"),
        "",
        "received by a GPU in a step, GB",
        *(f"  {name:<25}{value / 1e9:>9.2f}" for name, value in found.sent.items()),
        "",
        "seconds of a step",
        *(f"  {name:<25}{value:>9.3f}" for name, value in found.seconds.items()),
        f"  {'all':<25}{found.step:>9.3f}",
        "",
        f"model FLOPs of a step {found.flops:.3e}, MFU {found.mfu:.1%}, {found.samples_per_day:,.0f} clips a day",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.estimate", description="Memory and step time of a training run, without running it."
    )
    parser.add_argument("--preset", default="tavr_14b", help="tiny, wan_1_3b, tavr_14b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--ulysses", type=int, help="GPUs that share a clip; by default as few as fit")
    parser.add_argument("--batch", type=int, default=1, help="clips of a group at a time")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--frames", type=int, help="video frames of a clip; by default a chunk")
    parser.add_argument("--reference-latents", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--no-recompute", action="store_true", help="keep all activations")
    for name in ("linear", "attention", "memory-share", "link-share"):
        parser.add_argument(f"--{name}", type=float, help="share of the maker's rate that is reached")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    a = parser.parse_args(arguments)
    try:
        if a.gpu not in GPUS:
            raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {a.gpu!r}")
        shares = {k: v for k in ("linear", "attention", "memory_share", "link_share") if (v := getattr(a, k))}
        if any(not 0 < v <= 1 for v in shares.values()):
            raise InputError(f"shares of a rate: expected above 0 and up to 1, got {shares}")
        cfg, gpu = preset(a.preset), Gpu(**{**asdict(GPUS[a.gpu]), **shares})
        load = load_of(cfg, a.batch, a.frames, a.reference_latents, a.height, a.width)
        layout = Layout(a.gpus, a.ulysses or 1, a.accumulate, not a.no_recompute)
        check_layout(cfg, layout, gpu)
        if a.ulysses is None:
            layout = smallest_ulysses(cfg, load, layout, gpu)
        found = estimate(cfg, load, layout, gpu)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps({"layout": asdict(layout), "gpu": asdict(gpu), "bytes": found.bytes, **asdict(found)}))
    else:
        print(report(cfg, load, layout, gpu, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
