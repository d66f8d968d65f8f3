"""What GPUs can do by their makers' data sheets: where the models of time and memory on paper begin.

Dense bf16 FLOP/s, bytes, bytes/s of memory, of NVLink in one direction, and of one network card per GPU. From NVIDIA's
data sheets. A100 80 GB SXM: 312 TFLOP/s; 2.04 TB/s; NVLink 600 GB/s both ways; HDR InfiniBand 200 Gb/s in a DGX. H100
SXM5 and H200: 989 TFLOP/s; 80 GB at 3.35 TB/s, 141 GB at 4.8 TB/s; NVLink 900 GB/s both ways; NDR InfiniBand 400 Gb/s
in a DGX. B200, an eighth of a DGX B200: 36 PFLOP/s fp8 sparse is 2.25 bf16 dense each; 1440 GB at 64 TB/s; NVLink
1.8 TB/s both ways; 400 Gb/s.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """One GPU and its links, in FLOP/s, bytes and bytes/s; the network is shared by nobody, per GPU."""

    name: str
    peak: float
    memory: float
    memory_rate: float
    nvlink: float
    network: float
    per_node: int = 8


PEAKS = {
    p.name: p
    for p in (
        Peaks("a100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
        Peaks("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Peaks("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Peaks("b200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    )
}
