"""Several processes as one engine: ``with ranks(...) as run`` on each of them, started by torchrun.

    with ranks("cuda", ulysses=2, ring=1) as run:
        engine = AvatarEngine(device=run.device)
        if run.leads_with(engine):            # rank 0: reads, writes, shows progress
            engine.generate("person.mp4", "speech.wav", "out.mp4")
                                              # the others followed, and come here when it is done

Without torchrun it is one process, and nothing is spread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from avatar_rt.errors import InputError, RankError
from avatar_rt.runtime.parallel import Mesh, SequenceParallel
from avatar_rt.runtime.parallelise import parallelise
from avatar_rt.runtime.stripes import SpreadVAE
from avatar_rt.runtime.team import Team
from avatar_rt.runtime.transport import TorchTransport, join, launched, leave, local_device


class Run:
    """One process's part of a run. ``device``: the one it should compute on; ``leads``: whether it is rank 0."""

    def __init__(self, device: str, transport: TorchTransport | None, mesh: Mesh | None) -> None:
        self.device, self.transport, self.mesh = device, transport, mesh
        self.leads = mesh is None or mesh.rank == 0
        self.team: Team | None = None
        self.orderly = False  # this process may wait for the others at the end

    def leads_with(self, engine: Any, *, shard_weights: bool = False) -> bool:
        """Spreads an engine's transformer and decoder over the ranks. True at once on the leader, whose engine now
        runs on all of them; on the others False, when the leader is done.

        Raises: InputError when the heads cannot be divided; RankError when the leader is gone.
        """
        if self.transport is None or self.mesh is None:
            if shard_weights:
                raise InputError("shard_weights: expected several processes, started by torchrun, got one")
            return True
        self.mesh.check_heads(engine.config.dit.num_heads)
        store = self.transport.store
        assert store is not None, "join() keeps the store"
        self.team = Team(self.transport, store, engine.device)
        if shard_weights:
            from avatar_rt.runtime.sharded import shard_module

            shard_module(module_of(engine.dit), engine.device)
        spread = SequenceParallel(self.mesh, self.transport)
        engine.dit = parallelise(module_of(engine.dit), spread, self.team)
        engine.vae = SpreadVAE(module_of(engine.vae), self.transport, self.team)
        if not self.leads:
            self.orderly = self.team.follow()
        return self.leads


def module_of(form: Any) -> Any:
    """The module under a form of it for one process (recorded, graphed), which holds it as dit, vae or call."""
    while not isinstance(form, nn.Module):
        form = next(getattr(form, name) for name in ("dit", "vae", "call") if hasattr(form, name))
    return form


@contextmanager
def ranks(device: str, ulysses: int | None = None, ring: int | None = None) -> Iterator[Run]:
    """Joins the processes of this run; by default Ulysses over all of them.

    Raises: InputError when the degrees do not fit the number of processes; RankError when another process is gone,
        also in place of the SIGTERM that torchrun sends then, so that files are closed.
    """
    alone = not launched() and (ulysses or 1) * (ring or 1) == 1
    if alone:
        yield Run(device, None, None)
        return
    local = local_device(device)
    transport = join(local)
    ring = ring or 1
    try:
        mesh = Mesh(ulysses or max(transport.world // ring, 1), ring, transport.rank, transport.world)
    except InputError:
        leave(orderly=True)  # every rank says the same
        raise
    run = Run(str(local), transport, mesh)
    before = _on_sigterm(transport)
    failed = True
    try:
        yield run
        failed = False
    finally:
        if before is not None and not transport.failed:  # else torchrun's signal is still to come, and we are ending
            signal.signal(signal.SIGTERM, before)
        orderly = not failed and (run.leads or run.orderly)
        if run.team is not None:
            run.team.stop(orderly)
        leave(orderly)


def _on_sigterm(transport: TorchTransport) -> Any:
    """torchrun ends the rest with SIGTERM when one rank is gone: once, it becomes an exception where we are."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: FrameType | None) -> None:
        if not transport.failed:
            transport.failed = True
            raise RankError(f"rank {transport.rank}: told to end (SIGTERM), as torchrun does when another rank is gone")

    return signal.signal(signal.SIGTERM, stop)
