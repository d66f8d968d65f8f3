"""A request as a profiler sees it: ``python -m bench.trace trace.json`` (open in a Chrome-trace viewer).

``nsys profile python -m bench.trace --nvtx`` shows the same ranges in Nsight Systems.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.runtime.trace import nvtx_ranges

SAMPLES = Path(__file__).parent.parent / "avatar_rt" / "samples"


def request(device: str, seconds: float, steps: int) -> None:
    """The shipped samples through the shipped weights, every stage of it."""
    engine = AvatarEngine(device=device)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.mp4"
        # No overlap: torch's profiler looks at one thread.
        engine.generate(
            SAMPLES / "reference.mp4", SAMPLES / "speech.wav", out, seconds=seconds, steps=steps, overlap=False
        )


def record(path: Path, *, device: str = "cpu", seconds: float = 1.0, steps: int = 2) -> dict[str, int]:
    """Writes a Chrome trace of one request; returns how often each of our ranges is in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        request(device, seconds, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    ranges = [e for e in profiler.key_averages() if e.is_user_annotation]
    return {e.key: e.count for e in sorted(ranges, key=lambda e: -e.cpu_time_total)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description="Profile one request, stage by stage.")
    parser.add_argument("file", type=Path, nargs="?", help="Chrome trace to write")
    parser.add_argument("--nvtx", action="store_true", help="mark NVTX ranges (run under nsys)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of speech")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    if args.file is None and not args.nvtx:
        parser.error("nothing to do: expected a file, --nvtx, or both")
    try:
        with nvtx_ranges() if args.nvtx else nullcontext():
            if args.file is None:
                request(args.device, args.seconds, args.steps)
                return 0
            counts = record(args.file, device=args.device, seconds=args.seconds, steps=args.steps)
    except (InputError, UnsupportedError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{name:20} {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
