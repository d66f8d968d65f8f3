"""Sequence parallelism: rows spread over ranks outside attention, heads over ranks inside it (Ulysses), keys and values
passed around (ring), or both.

Ranks number the mesh Ulysses first: ranks r*U .. r*U + U-1 share one part of the ring and should be neighbours on the
fastest links. Each rank holds its heads' K_R and V_R for all R reference rows, from the moment they are computed: no
reference row is sent after that, at the price that the R ranks of a ring hold the same shard. All of it is
differentiable; gradients averaged over ranks are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avatar_rt import ops
from avatar_rt.errors import InputError
from avatar_rt.ops import PackedReference
from avatar_rt.ops.packed import layout_of
from avatar_rt.runtime.transport import Group, Pending, Transport

Attended = tuple[Tensor, Tensor]  # output and LSE
ReferenceRows = tuple[Tensor, Tensor] | PackedReference  # of one block


@dataclass(frozen=True)
class Mesh:
    """Ulysses degree times ring degree ranks.

    Raises: InputError when the product is not the number of processes.
    """

    ulysses: int
    ring: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} degree: expected at least 1, got {getattr(self, name)}")
        if self.ulysses * self.ring != self.world:
            raise InputError(
                f"ulysses degree {self.ulysses} x ring degree {self.ring}: expected as many as there are processes, "
                f"{self.world}, got {self.ulysses * self.ring}"
            )

    def check_heads(self, num_heads: int) -> None:
        """Raises: InputError unless Ulysses can give every rank the same number of heads."""
        if num_heads % self.ulysses:
            fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and self.world % n == 0]
            raise InputError(
                f"ulysses degree: expected a divisor of num_heads={num_heads}, got {self.ulysses}; with {self.world} "
                f"processes it can be {', '.join(map(str, fits))} (and the ring degree the rest)"
            )

    @property
    def ring_rank(self) -> int:
        return self.rank // self.ulysses

    @property
    def ulysses_groups(self) -> list[list[int]]:
        return [[r * self.ulysses + u for u in range(self.ulysses)] for r in range(self.ring)]

    @property
    def ring_groups(self) -> list[list[int]]:
        return [[r * self.ulysses + u for r in range(self.ring)] for u in range(self.ulysses)]


def split_rows(total: int, parts: int) -> list[int]:
    """``total`` rows in ``parts`` runs whose lengths differ by one at most, the longer first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def merge(a: Attended, b: Attended) -> Attended:
    """Two attentions of the same queries over disjoint keys -> the attention over both, in fp32 (fp64 for fp64).

    a, b: output [B, L, N, D] and natural-log LSE [B, N, L]. A share is known to one ulp of the LSE, no better.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for part in (lse_a, lse_b)]
    return out_a.to(lse.dtype) * weights[0] + out_b.to(lse.dtype) * weights[1], lse


class SequenceParallel:
    """One mesh over one transport; ``VideoRefDiT`` takes it as ``spread``. Made on every rank, in the same order."""

    def __init__(self, mesh: Mesh, transport: Transport) -> None:
        self.mesh, self.transport = mesh, transport
        self.ulysses = transport.group(mesh.ulysses_groups)
        self.ring = transport.group(mesh.ring_groups)
        self.all = transport.everybody

    def rows(self, total: int) -> RowShare:
        """This rank's share of ``total`` rows. Raises InputError when there is not a row for every rank."""
        if total < self.mesh.world:
            raise InputError(f"rows: expected at least one for each of {self.mesh.world} ranks, got {total}")
        return RowShare(self, split_rows(total, self.mesh.world))


class RowShare:
    """One rank's share of a pass (``models.spread.Share``)."""

    def __init__(self, parallel: SequenceParallel, counts: list[int]) -> None:
        self.parallel, self.counts = parallel, counts
        mesh = parallel.mesh
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.bounds = [(end - n, end) for end, n in zip(ends, counts, strict=True)]
        self.own = slice(*self.bounds[mesh.rank])
        # rows of each part of the ring, and of each member of this rank's part
        self.parts = [sum(counts[r] for r in ranks) for ranks in mesh.ulysses_groups]
        self.members = [counts[r] for r in parallel.ulysses.ranks]

    # ---- generated rows --------------------------------------------------------------------------------------------

    def attend(self, qkv: Iterable[Tensor], ref: ReferenceRows | None, strength: float) -> Tensor:
        """See ``Share.attend``. What travels meanwhile: keys and values while the queries attend to the reference, and
        each turn of the ring while they attend to the keys of the last turn and to a slice of the reference."""
        q_sent, k_sent, v_sent = [self._send_heads(x) for x in qkv]
        ring, q = self.parallel.ring, q_sent.wait()
        found: Attended | None = None
        slices = [] if ref is None or strength == 0 else _slices(ref, ring.size)
        if ring.size == 1 and slices:
            found = _over_reference(q, slices.pop(), strength)
        k, v = k_sent.wait(), v_sent.wait()
        for turn in range(ring.size):
            coming = [self._pass_on(x, turn) for x in (k, v)] if turn + 1 < ring.size else []
            part = ops.sparse_reference_attention(q, k, v, return_lse=True)
            assert isinstance(part, tuple)
            found = part if found is None else merge(found, part)
            if slices:
                found = merge(found, _over_reference(q, slices.pop(), strength))
            if coming:
                k, v = (pending.wait() for pending in coming)
        assert found is not None
        return self._send_rows(found[0].to(q.dtype))

    # ---- reference rows --------------------------------------------------------------------------------------------

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Share.to_heads``."""
        q, k, v = (pending.wait() for pending in [self._send_heads(x) for x in (q, k, v)])
        if self.parallel.ring.size > 1:
            k, v = (self._whole(x) for x in (k, v))
            q = self._whole(q) if whole else q
        return q, k, v

    def to_rows(self, x: Tensor, whole: bool) -> Tensor:
        """See ``Share.to_rows``."""
        if whole and self.parallel.ring.size > 1:
            x = x.split(self.parts, dim=1)[self.parallel.mesh.ring_rank]
        return self._send_rows(x)

    def gather(self, x: Tensor, rows: list[int]) -> Tensor:
        """See ``Share.gather``."""
        return self._gather(x, rows, self.parallel.all)

    # ---- what travels: [rows, B, heads, D], contiguous -------------------------------------------------------------

    def _send_heads(self, x: Tensor) -> Pending:
        """Own rows of all heads [B, l, N, D] -> the Ulysses group's rows of own heads [B, L', N / U, D]."""
        group = self.parallel.ulysses
        self.parallel.mesh.check_heads(x.shape[2])
        if group.size == 1:
            return Pending(x)
        mine = x.shape[1]
        send = x.unflatten(2, (group.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
        return self._all_to_all(send, [mine] * group.size, self.members)

    def _send_rows(self, x: Tensor) -> Tensor:
        """The inverse of ``_send_heads``."""
        group = self.parallel.ulysses
        if group.size == 1:
            return x
        mine = self.counts[self.parallel.mesh.rank]
        x = self._all_to_all(x.transpose(0, 1).contiguous(), self.members, [mine] * group.size).wait()
        return x.unflatten(1, (group.size, mine)).permute(0, 2, 1, 3, 4).flatten(2, 3)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Pending:
        pending: list[Pending] = []
        out = _AllToAll.apply(x, send, receive, self.parallel, pending)
        return Pending(out.transpose(0, 1), pending[0].wait)

    def _pass_on(self, x: Tensor, turn: int) -> Pending:
        """Keys or values to the next rank of the ring; what the previous one held for this turn comes in."""
        ring, at = self.parallel.ring, self.parallel.mesh.ring_rank
        rows = self.parts[(at - turn - 1) % ring.size]
        pending: list[Pending] = []
        out = _PassOn.apply(x.transpose(0, 1).contiguous(), rows, self.parallel, pending)
        return Pending(out.transpose(0, 1), pending[0].wait)

    def _whole(self, x: Tensor) -> Tensor:
        return self._gather(x, self.parts, self.parallel.ring)

    def _gather(self, x: Tensor, rows: list[int], group: Group) -> Tensor:
        out = _Gather.apply(x.transpose(0, 1).contiguous(), rows, self.parallel.transport, group)
        return out.transpose(0, 1)


def _slices(ref: ReferenceRows, parts: int) -> list[ReferenceRows]:
    """A reference cut into so many runs of rows, without a copy; whole where its packing cannot be cut."""
    if parts == 1:
        return [ref]
    if isinstance(ref, PackedReference):
        if layout_of(ref.k, ref.v) != "rows":
            return [ref]
        ref = (ref.k.transpose(1, 2), ref.v.transpose(1, 2))
    runs = [n for n in split_rows(ref[0].shape[1], parts) if n]
    return list(zip(*(x.split(runs, dim=1) for x in ref), strict=True))


def _over_reference(q: Tensor, ref: ReferenceRows, strength: float) -> Attended:
    if isinstance(ref, PackedReference):
        found = ops.sparse_reference_attention(q, None, None, packed=ref, strength=strength, return_lse=True)
    else:
        found = ops.sparse_reference_attention(q, None, None, *ref, strength=strength, return_lse=True)
    assert isinstance(found, tuple)
    return found


class _AllToAll(torch.autograd.Function):
    """Starts in the forward and is waited for by its user; the gradient goes back the same way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], parallel: SequenceParallel, pending: list[Pending]
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.parallel = send, receive, parallel
        pending.append(parallel.transport.all_to_all(x, send, receive, parallel.ulysses))
        return pending[0].out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transport, group = ctx.parallel.transport, ctx.parallel.ulysses
        back = transport.all_to_all(grads[0].contiguous(), ctx.receive, ctx.send, group).wait()
        return back, None, None, None, None


class _PassOn(torch.autograd.Function):
    """One turn of the ring; the gradient turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, parallel: SequenceParallel, pending: list[Pending]) -> Tensor:
        ring, at = parallel.ring.ranks, parallel.mesh.ring_rank
        ctx.next, ctx.previous = ring[(at + 1) % len(ring)], ring[at - 1]
        ctx.rows, ctx.transport = x.shape[0], parallel.transport
        out = x.new_empty((rows, *x.shape[1:]))
        started = parallel.transport.exchange([(x, ctx.next)], [(out, ctx.previous)])
        pending.append(started)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        back = grad.new_empty((ctx.rows, *grad.shape[1:]))
        ctx.transport.exchange([(grad, ctx.previous)], [(back, ctx.next)]).wait()
        return back, None, None, None


class _Gather(torch.autograd.Function):
    """All ranks' rows on every rank; the gradient of a row is the sum of what every rank found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], transport: Transport, group: Group) -> Tensor:
        ctx.rows, ctx.transport, ctx.group = rows, transport, group
        return transport.all_gather(x, rows, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size = ctx.group.size
        mine = ctx.rows[ctx.group.ranks.index(ctx.transport.rank)]
        back = ctx.transport.all_to_all(grads[0].contiguous(), ctx.rows, [mine] * size, ctx.group).wait()
        return back.unflatten(0, (size, mine)).sum(0), None, None, None
