"""generate under torchrun: one video by two processes, and a clear and quick end when one of them is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_parallel import random_bundle

from avatar_rt.__main__ import SAMPLES, main
from avatar_rt.errors import RankError
from avatar_rt.media.reader import read_video
from avatar_rt.runtime import team

GIVEN = [str(SAMPLES / "reference.mp4"), str(SAMPLES / "speech.wav"), "--bundle"]
MAX_SECONDS = 30.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "bundle"
    random_bundle(path)
    return str(path)


def _torchrun(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "-m", "avatar_rt", "generate", *args], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _process_of_rank(agent: int, rank: int) -> int:
    """The child of torchrun that is this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except (OSError, ValueError):
            continue
    pytest.fail(f"no process of rank {rank} under {agent}")


def test_two_processes_write_the_video_of_one(bundle: str, tmp_path: Path) -> None:
    one, other, two = (tmp_path / f"{name}.mp4" for name in ("one", "other", "two"))
    for out, seed in ((one, "0"), (other, "1")):
        assert main(["generate", *GIVEN, bundle, "-o", str(out), "--seconds", "0.5", "--seed", seed]) == 0
    run = _torchrun(*GIVEN, bundle, "-o", str(two), "--seconds", "0.5", "--ulysses-degree", "2", "--shard-weights")
    told = run.communicate(timeout=200)[0]
    assert run.returncode == 0, told
    assert told.count("wrote ") == 1  # only the leader speaks
    pictures = [read_video(path).frames.astype(int) for path in (one, two, other)]
    assert pictures[0].shape == pictures[1].shape
    # The transformer computes in bf16 where it can, and the codec adds its own; test_parallel compares frames in fp32.
    rounding, seeds = (np.abs(pictures[0] - p).mean() for p in pictures[1:])
    assert rounding < 0.2 * seeds, (rounding, seeds)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks' processes in /proc")
@pytest.mark.parametrize("rank", [1, 0])
def test_a_lost_rank_ends_the_run(rank: int, bundle: str, tmp_path: Path) -> None:
    """The others say so and end by themselves."""
    out = tmp_path / "long.mp4"
    run = _torchrun(*GIVEN, bundle, "-o", str(out), "--steps", "2000", "--ring-degree", "2")
    assert run.stdout is not None
    try:
        while not any(tmp_path.iterdir()):  # the leader has begun to write: chunks are being made
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.1)
        lost = _process_of_rank(run.pid, rank)
        os.kill(lost, signal.SIGKILL)
        started = time.monotonic()
        told = ""
        while "error: " not in told:
            line = run.stdout.readline()
            assert line, told
            told += line
        assert time.monotonic() - started < MAX_SECONDS
        told += run.communicate(timeout=60)[0]
    finally:
        run.terminate()  # torchrun ends its ranks
        run.wait(timeout=60)
    assert run.returncode != 0
    (sentence,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert f"rank {1 - rank}" in sentence or f"rank {rank}" in sentence
    if rank:
        assert not out.exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks' processes in /proc")
def test_what_a_lost_rank_leaves_can_be_gone_on_with(bundle: str, tmp_path: Path) -> None:
    """The same frames as without the loss, on as many ranks; on another number the run is refused."""
    out, whole = tmp_path / "lost.mp4", tmp_path / "whole.mp4"
    options = ("--steps", "12", "--seconds", "3")
    run = _torchrun(*GIVEN, bundle, "-o", str(out), *options)
    record = out.with_name(out.name + ".resume")
    try:
        while not record.exists():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)
        os.kill(_process_of_rank(run.pid, 1), signal.SIGKILL)
        told = run.communicate(timeout=60)[0]
    finally:
        run.terminate()
        run.wait(timeout=60)
    assert run.returncode != 0 and record.exists() and not out.exists(), told
    assert main(["generate", *GIVEN, bundle, "-o", str(out), *options, "--resume"]) == 2
    for path, more in ((out, ["--resume"]), (whole, [])):
        run = _torchrun(*GIVEN, bundle, "-o", str(path), *options, *more)
        told = run.communicate(timeout=200)[0]
        assert run.returncode == 0, told
    assert out.read_bytes() == whole.read_bytes()


def test_a_rank_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heartbeats of one store: while both beat all is well; when one stops, the other says which."""
    monkeypatch.setattr(team, "BEAT_S", 0.02)
    monkeypatch.setattr(team, "LOST_AFTER_S", 2.0)
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    told: list[str] = []
    first = team.Heartbeat(store, 0, [1], lambda: told.append("lost"))
    second = team.Heartbeat(store, 1, [0], lambda: None)
    time.sleep(0.3)
    first.check(), second.check()
    second.stop()
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    first.stop()
    with pytest.raises(RankError, match="rank 1 of this run has not answered"):
        first.check()
