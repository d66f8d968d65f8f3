"""Stored runs of ``bench.stream`` and ``bench.stages`` as README's tables."""

from __future__ import annotations

from typing import Any

SYSTEMS = {
    "ours": "avatar_rt",
    "eager": "plain torch in bf16, the reference recomputed in every pass",
    "compiled": "`torch.compile` of that, our cache granted to it",
}


def _of(data: dict[str, Any], bench: str) -> str:
    r, m = data["result"], data["machine"]
    return (
        f"on {m['cpu']} (`python -m bench.{bench}`; {r['threads']} thread(s), preset {r['config']}, "
        f"{r['size'][0]} x {r['size'][1]}, {r['seconds']:g} s of speech, weights {r['weights']}, torch {m['torch']}, "
        f"commit {m['commit']})"
    )


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def stream_table(data: dict[str, Any]) -> list[str]:
    """Sound to finished file: a line a system, in the order of SYSTEMS."""
    found = data["result"]["systems"]
    lines = [
        "",
        f"From sound to the finished file {_of(data, 'stream')}; the three took turns; errors in grey levels.",
        "",
    ]
    lines.append(_row("system", "frames/s", "CPU time over ours", "first frame, s", "chunk P50, P95, s", "rms error"))
    lines.append("|---|---|---|---|---|---|")
    for name, told in SYSTEMS.items():
        if name in found:
            s, chunk = found[name], "{chunk_p50_s:.2f}, {chunk_p95_s:.2f}".format(**found[name])
            ratio = f"{s['cpu_s'] / found['ours']['cpu_s']:.2f}"
            lines.append(_row(told, f"{s['fps']:.1f}", ratio, f"{s['first_s']:.2f}", chunk, f"{s['rms']:.2f}"))
    return lines


def stages_table(data: dict[str, Any]) -> list[str]:
    """Where a request's time goes: the stages by CPU time, and the peak of memory."""
    r = data["result"]
    lines = ["", f"Where a request's time goes {_of(data, 'stages')}.", ""]
    lines += [_row("stage", "calls", "CPU ms a call"), "|---|---|---|"]
    by_time = sorted(r["stages"].items(), key=lambda item: -item[1]["cpu_ms"] * item[1]["calls"])
    lines += [_row(name, s["calls"], f"{s['cpu_ms']:.2f}") for name, s in by_time]
    told = "Memory: {loaded:.0f} MiB with the person prepared, {generated:.0f} MiB at the peak."
    return [*lines, "", told.format(**r["peak_mib"])]
