"""A transformer spread over ranks behind its own signature: the pipeline cannot tell.

The leader's calls go to every rank through a ``Team``. A reference is encoded by all ranks together and stays where it
was computed: each keeps its heads under a number, and a pass names the number. So is one read from a file, whose heads
are sent out when it is first used. No pass sends a reference row.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import PackedReference, pack_reference
from avatar_rt.runtime.parallel import SequenceParallel
from avatar_rt.runtime.team import Team

Given = tuple[Tensor, Tensor] | list[PackedReference]  # of all blocks: k and v [layers, B, R, N, D], or packed


def parallelise(dit: Any, spread: SequenceParallel, team: Team) -> SpreadDiT:
    """Spreads a transformer's passes over the ranks; called on every rank, used on the leader.

    Args:
        dit: ``VideoRefDiT``, or a module with its ``forward``, ``encode_reference`` and ``cfg``.

    Raises: InputError when the heads cannot be divided by the Ulysses degree.
    """
    spread.mesh.check_heads(dit.cfg.num_heads)
    return SpreadDiT(dit, spread, team)


class SpreadDiT:
    """What ``parallelise`` returns: a callable with VideoRefDiT's signature."""

    def __init__(self, dit: Any, spread: SequenceParallel, team: Team) -> None:
        self.dit, self.spread, self.team = dit, spread, team
        self._shards: dict[int, Given] = {}  # by number; the leader's own are the caller's, but for those sent out
        self._forms: dict[int, dict[tuple[str, int], list[PackedReference]]] = {}  # the same, packed
        self._known = _Numbers()
        self._own: dict[str, Any] = {}  # the leader's, within a call
        self._sent: list[list[Tensor]] = []
        for name in ("encode", "forward", "receive"):
            team.register(f"dit.{name}", getattr(self, f"_{name}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dit, name)

    # ---- the leader ------------------------------------------------------------------------------------------------

    def encode_reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """VideoRefDiT.encode_reference on all ranks; returns this rank's heads [layers, B, R, N', D]."""
        with self.team.lock:
            number = self._known.new()
            k, v = self.team.call("dit.encode", number, self._known.dropped(), args, kwargs)
            self._known.learn(number, k, k[-1, 0, 0])  # not used by a pass yet: kept even when k itself is let go
            return k, v

    def __call__(
        self,
        *args: Any,
        ref_k: Tensor | None = None,
        ref_v: Tensor | None = None,
        packed: Sequence[PackedReference] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """VideoRefDiT.forward on all ranks. References are those of ``encode_reference``, or have all heads."""
        given: Given | None = None
        if packed is not None:
            given = list(packed)
        elif ref_k is not None and ref_v is not None:
            given = (ref_k, ref_v)
        with self.team.lock:
            if given is None:
                return self.team.call("dit.forward", None, "", 1, self._known.dropped(), args, kwargs)
            number = self._number(given)
            if number not in self._shards:  # else it had all heads, and this rank has cut out its own
                self._own = {"packed": given} if isinstance(given, list) else {"ref_k": given[0], "ref_v": given[1]}
            try:
                return self.team.call("dit.forward", number, *_form(given), self._known.dropped(), args, kwargs)
            finally:
                self._own = {}

    def _number(self, given: Given) -> int:
        """The number of a reference: by its tensors, else by its last block's first keys, which depend on all of it."""
        tensor = given[-1].k if isinstance(given, list) else given[0]
        number = self._known.of(tensor)
        if number is None:
            probe = _first_keys(given)
            number = self._known.like(probe, exact=tensor.dtype != torch.int8)
            if number is None:
                number = self._send_out(given, probe.shape[0])
            self._known.learn(number, tensor, probe)
        self._known.used.add(number)
        return number

    def _send_out(self, given: Given, heads: int) -> int:
        """A reference that the ranks have not seen: each gets its heads, once."""
        all_heads = self.dit.cfg.num_heads
        if heads != all_heads:
            raise InputError(
                f"reference: expected one of this run or one with all {all_heads} heads, got {heads} heads"
            )
        number = self._known.new()
        tensors = [list(p[:4]) for p in given] if isinstance(given, list) else [[k, v] for k, v in zip(*given)]
        rows = given[-1].rows if isinstance(given, list) else 0
        shapes = [[(list(t.shape), t.dtype) for t in layer] for layer in tensors]
        self._sent = tensors
        try:
            self.team.call("dit.receive", number, rows, shapes, self._known.dropped())
        finally:
            self._sent = []
        return number

    # ---- every rank ------------------------------------------------------------------------------------------------

    def _encode(self, number: int, dropped: list[int], args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        self._drop(dropped)
        k, v = self.dit.encode_reference(*args, **kwargs, spread=self.spread)
        if not self.team.leads:
            self._shards[number] = (k, v)
        return k, v

    def _forward(self, number: int | None, how: str, batch: int, dropped: list[int], args: Any, kwargs: Any) -> Any:
        self._drop(dropped)
        own = self._own
        if number is not None and not own:
            own = self._shard(number, how, batch)
        return self.dit(*args, **kwargs, **own, spread=self.spread)

    def _shard(self, number: int, how: str, batch: int) -> dict[str, Any]:
        """This rank's heads of a reference, in the form in which the leader has its own, for as many batch rows."""
        shard, form = self._shards[number], (how, batch)
        if how == "plain" and not isinstance(shard, list):
            k, v = (x.expand(-1, batch, -1, -1, -1) for x in shard)
            return {"ref_k": k, "ref_v": v}
        forms = self._forms.setdefault(number, {})
        if form not in forms:
            if not isinstance(shard, list):
                storage = "int8" if how == "int8" else None
                shard = [pack_reference(*kv, storage=storage) for kv in zip(*shard, strict=True)]
            forms[form] = [_repeated(p, batch) for p in shard]
        return {"packed": forms[form]}

    def _receive(self, number: int, rows: int, shapes: list[Any], dropped: list[int]) -> None:
        """Takes this rank's heads, block by block: dimension 1 of packed tensors, 2 of plain ones."""
        self._drop(dropped)
        mesh, transport = self.spread.mesh, self.spread.transport
        axis = 1 if len(shapes[0]) == 4 else 2
        layers: list[list[Tensor]] = []
        for i, layer in enumerate(shapes):
            cuts = [_own_heads(shape, axis, mesh.ulysses) for shape, _ in layer]
            if self.team.leads:
                slices = [[_cut(t, axis, mesh.ulysses, r) for t in self._sent[i]] for r in range(mesh.world)]
                transport.exchange([(t, r) for r in range(1, mesh.world) for t in slices[r] if t.numel()], []).wait()
                layers.append(slices[0])
            else:
                parts = [
                    torch.empty(shape, dtype=dtype, device=self.team.device)
                    for shape, (_, dtype) in zip(cuts, layer, strict=True)
                ]
                transport.exchange([], [(t, 0) for t in parts if t.numel()]).wait()
                layers.append(parts)
        if axis == 1:
            self._shards[number] = [PackedReference(k, v, ks, vs, rows) for k, v, ks, vs in layers]
        else:
            self._shards[number] = (torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers]))

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._shards.pop(number, None)
            self._forms.pop(number, None)


class _Numbers:
    """The references that the ranks hold, as the leader knows them: kept until the last tensor of theirs is gone, and
    at least until a pass has used them."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self._next = itertools.count()
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id
        self._probes: dict[int, Tensor] = {}

    def new(self) -> int:
        return next(self._next)

    def learn(self, number: int, tensor: Tensor, probe: Tensor) -> None:
        self._tensors[id(tensor)] = (weakref.ref(tensor), number)
        self._probes.setdefault(number, probe.clone())

    def of(self, tensor: Tensor) -> int | None:
        ref, number = self._tensors.get(id(tensor), (None, None))
        return number if ref is not None and ref() is tensor else None

    def like(self, probe: Tensor, *, exact: bool) -> int | None:
        """The number whose first keys are these, or to the precision of int8 storage."""
        for number, own in self._probes.items():
            limit = 0.0 if exact else float(own.abs().max()) / 200
            if own.shape == probe.shape and float((own.float() - probe.float()).abs().max()) <= limit:
                return number
        return None

    def dropped(self) -> list[int]:
        """Used numbers none of whose tensors is alive any more; they are forgotten here."""
        self._tensors = {i: (ref, n) for i, (ref, n) in self._tensors.items() if ref() is not None}
        alive = {n for _, n in self._tensors.values()}
        gone = [n for n in self._probes if n in self.used and n not in alive]
        for n in gone:
            del self._probes[n]
            self.used.discard(n)
        return gone


def _form(given: Given) -> tuple[str, int]:
    """How the leader has a reference, and for how many batch rows."""
    if not isinstance(given, list):
        return "plain", given[0].shape[1]
    return "int8" if given[-1].k.dtype == torch.int8 else "packed", given[-1].k.shape[0]


def _first_keys(given: Given) -> Tensor:
    """[N', D]: the keys of the first row in the last block, all heads."""
    if not isinstance(given, list):
        return given[0][-1, 0, 0]
    last = given[-1]
    keys = last.k[0, :, 0]
    return keys * last.k_scale[0, :, :1] if last.k.dtype == torch.int8 else keys


def _own_heads(shape: list[int], axis: int, parts: int) -> list[int]:
    return shape if len(shape) == 1 else [n // parts if i == axis else n for i, n in enumerate(shape)]


def _cut(x: Tensor, axis: int, parts: int, rank: int) -> Tensor:
    """The heads of a rank; a tensor that stands for nothing (no scales) stays as it is."""
    return x if x.ndim == 1 else x.chunk(parts, dim=axis)[rank % parts].contiguous()


def _repeated(p: PackedReference, batch: int) -> PackedReference:
    if p.k.shape[0] == batch:
        return p

    def repeat(x: Tensor) -> Tensor:
        return x if x.ndim == 1 else x[:1].expand(batch, *x.shape[1:]).contiguous()

    return PackedReference(repeat(p.k), repeat(p.v), repeat(p.k_scale), repeat(p.v_scale), p.rows)
