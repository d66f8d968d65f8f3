"""One run of ``python -m bench.ops``: its settings, what --filter lets through, and the rows it has made."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.contenders import Shape
from bench.harness import Clock, Contender, Judge, contest, peak_of
from bench.memory import extra_bytes, in_child

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Rows = list[dict[str, Any]]


@dataclass
class Run:
    """Settings, ceilings (FLOP/s and bytes/s, from ``harness.ceilings``) and rows."""

    device: str
    threads: int = 1
    quick: bool = False
    dtypes: Sequence[str] = tuple(DTYPES)
    word: str = ""
    with_flex: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: Rows = field(default_factory=list)

    @property
    def clock(self) -> Clock:
        return Clock(self.device, self.threads)

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def cases(self, table: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(name, dtype) whose "table name dtype" contains the filter's word."""
        yield from ((n, d) for n in names for d in self.dtypes if self.word.lower() in f"{table} {n} {d}".lower())

    def contest(
        self, found: list[Contender], judge: Judge, flops: float, moved: float, dtype: str, coarse: Judge | None = None
    ) -> Rows:
        peak, _ = peak_of(self.ceilings, DTYPES[dtype])
        return contest(found, judge, self.clock, flops=flops, moved=moved, peak=peak, coarse=coarse)

    def add_memory(self, task: str, shape: Shape, dtype: str, found: list[Contender], rows: Rows) -> None:
        """Adds peak extra bytes to the rows that have a time."""
        names = [r["name"] for r in rows if "refused" not in r and r["name"] != "FlexAttention"]
        if self.gpu:
            calls = {c.name: c.call for c in found}
            sizes = {n: extra_bytes(calls[n], self.device) for n in names}
        else:
            sizes = in_child(task, shape, DTYPES[dtype], names, self.threads)
        for row in rows:
            row["extra_bytes"] = sizes.get(row["name"])

    def post(self, table: str, case: str, words: str, dtype: str, rows: Rows) -> None:
        """Prints and keeps a case's rows."""
        print(f"\n{table} | {case} | {words} | {dtype}")
        heads = ("ms", "p90", "GFLOP/s", "GB/s", "% peak", "extra MB", "x base", "error")
        print(f"  {'':34}" + "".join(f"{h:>10}" for h in heads))
        for row in rows:
            ran = f" [{row['implementation']}]" if "implementation" in row else ""
            if "refused" in row:
                print(f"  {row['name'] + ran:34}  no figure: {row['refused']}")
            else:
                print(f"  {row['name'] + ran:34}" + "".join(f"{c:>10}" for c in _cells(row)))
        sys.stdout.flush()
        self.rows += [{"table": table, "case": case, "words": words, "dtype": dtype, **row} for row in rows]


def _cells(row: dict[str, Any]) -> list[str]:
    extra, ratio = row.get("extra_bytes"), row.get("times_baseline")
    share = row.get("of_copy", row.get("of_peak"))
    return [
        f"{row['median_ms']:.3f}",
        f"{row['p90_ms']:.3f}",
        f"{row['gflops']:.0f}",
        f"{row['gb_per_s']:.1f}",
        "" if share is None else f"{share:.0%}",
        "" if extra is None else f"{extra / 2**20:.1f}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if row["error"] is None else f"{row['error']:.0e}",
    ]
