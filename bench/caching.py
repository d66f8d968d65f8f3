"""What caching the reference saves, against arithmetic: ``python -m bench.caching``.

A step with the reference in the cache computes G rows, one that recomputes it G + R. Measured in thread CPU time, the
two taken in turn; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avatar_rt.config import DiTConfig
from avatar_rt.models.dit import VideoRefDiT

CONFIG = DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, text_dim=32, text_len=8, reference=True)
GRID = 16  # latents a side: 64 tokens a frame


def flops(work: Callable[[], object], attended: int, cfg: DiTConfig) -> float:
    """Of one call: what torch counts, and ``attended`` (query, key) pairs a block, which our attention ops compute."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() + 4.0 * cfg.dim * attended * cfg.num_layers


def thread_ms(work: Callable[[], object]) -> float:
    begun = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - begun)


def measure(frames: int, rounds: int, cfg: DiTConfig = CONFIG) -> dict[str, float]:
    """FLOPs and times of a step with and without the cache, with four reference frames for each generated one."""
    torch.manual_seed(0)
    dit = VideoRefDiT(cfg).eval()
    z, ref = (torch.randn(1, 16, t, GRID, GRID) for t in (frames, 4 * frames))
    text, t = torch.zeros(1, cfg.text_len, cfg.text_dim), torch.full((1, frames), 0.5)
    g, r = frames * (GRID // 2) ** 2, 4 * frames * (GRID // 2) ** 2

    def step(k: Tensor, v: Tensor) -> Tensor:
        return dit(z, t, text, ref_k=k, ref_v=v)[0]

    with torch.inference_mode():
        kept = dit.encode_reference(ref, text)

        def cached() -> Tensor:
            return step(*kept)

        def recomputed() -> Tensor:
            return step(*dit.encode_reference(ref, text))

        # What the last block would make of the reference rows is not computed: one block's R x R pairs fewer.
        own = r * r * (cfg.num_layers - 1) // cfg.num_layers
        few = flops(cached, g * (g + r), cfg)
        many = flops(recomputed, g * (g + r) + own, cfg)
        cached(), recomputed()
        times = [(thread_ms(cached), thread_ms(recomputed)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in times)
    return {
        "g": g, "r": r, "cached_gflop": few / 1e9, "recomputed_gflop": many / 1e9, "flop_ratio": many / few,
        "cached_ms": statistics.median(a for a, _ in times), "recomputed_ms": statistics.median(b for _, b in times),
        "time_ratio": ratio, "time_over_flops": ratio / (many / few),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.caching", description=__doc__)
    parser.add_argument("--frames", type=int, default=8, help="generated latent frames, a quarter of the reference's")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.frames, args.rounds)
    print(f"G = {found['g']}, R = {found['r']}: {found['flop_ratio']:.2f} times the FLOPs without the cache, ", end="")
    print(f"{found['time_ratio']:.2f} times the time")
    print(json.dumps({k: round(v, 4) for k, v in found.items()} | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
