"""Runs one function on several gloo ranks: what torchrun does, without its agent. ``launch`` is for tests."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a process, and one thread for each."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {k: str(v) for k, v in given.items()} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(world: int, *command: str) -> list[subprocess.Popen[str]]:
    """The same command once per rank."""
    port = free_port()
    return [
        subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(rank, world, port), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(world)
    ]  # fmt: skip


def launch(world: int, function: str, folder: Path) -> list[dict[str, Any]]:
    """Calls ``module.function(folder)`` on every rank; what each returned, by rank. Fails with a rank's output."""
    ranks = start(world, str(Path(__file__)), function, str(folder))
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for i, rank in enumerate(ranks):
        assert rank.returncode == 0, f"rank {i} exited with {rank.returncode}:\n{told[i]}"
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(world)]


def main() -> None:
    module, _, name = sys.argv[1].rpartition(".")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = getattr(importlib.import_module(module), name)(Path(sys.argv[2]))
    torch.save(result, Path(sys.argv[2]) / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
