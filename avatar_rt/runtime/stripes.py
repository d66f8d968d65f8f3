"""A VAE decoder spread over ranks by horizontal stripes, behind its own signature.

The leader keeps the decoder's state whole: it sends each rank its rows with a call and gathers them after it, so that
followers hold nothing between calls and a state that was saved continues on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from avatar_rt.runtime.parallel import split_rows
from avatar_rt.runtime.team import Team
from avatar_rt.runtime.transport import Transport


class RankSeams:
    """Stripes of a picture over all ranks, the first on rank 0 (``models.stripes.Seams``)."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.all = transport.everybody
        self.heights: list[int] = []  # latent rows of every rank's stripe, set by each call

    def extend(self, *stripes: Tensor) -> tuple[list[Tensor], int]:
        """See ``Seams.extend``."""
        rank, sends, receives = self.transport.rank, [], []
        above, below = rank > 0, rank + 1 < self.transport.world
        extended: list[list[Tensor]] = []
        for x in stripes:
            parts = [x]
            if above:
                sends.append((x[:, :, :, :1].contiguous(), rank - 1))
                parts.insert(0, torch.empty_like(sends[-1][0]))
                receives.append((parts[0], rank - 1))
            if below:
                sends.append((x[:, :, :, -1:].contiguous(), rank + 1))
                parts.append(torch.empty_like(sends[-1][0]))
                receives.append((parts[-1], rank + 1))
            extended.append(parts)
        self.transport.exchange(sends, receives).wait()
        return [torch.cat(parts, dim=3) for parts in extended], int(above)

    def whole(self, stripe: Tensor) -> Tensor:
        """See ``Seams.whole``."""
        scale = stripe.shape[3] // self.heights[self.transport.rank]
        rows = [n * scale for n in self.heights]
        x = stripe.permute(3, 0, 1, 2, 4).contiguous()
        return self.transport.all_gather(x, rows, self.all).wait().permute(1, 2, 3, 0, 4)


class SpreadVAE:
    """A ``VideoVAE`` whose ``decode_step`` runs on all ranks; made on every rank, used on the leader."""

    def __init__(self, vae: Any, transport: Transport, team: Team) -> None:
        self.vae, self.transport, self.team = vae, transport, team
        self.seams = RankSeams(transport)
        self._stripe = vae.striped(self.seams)
        self._state: list[Tensor] = []  # the leader's, whole, within a call
        team.register("vae.decode", self._decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode_step(self, z: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """VideoVAE.decode_step on all ranks; a picture with fewer latent rows than ranks is decoded here alone."""
        if z.ndim != 5 or z.shape[3] < self.transport.world:
            return self.vae.decode_step(z, state)
        shapes = None if state is None else [(list(s.shape), s.dtype) for s in state]
        with self.team.lock:
            self._state = list(state or ())
            try:
                return self.team.call("vae.decode", z, shapes)
            finally:
                self._state = []

    def _decode(self, z: Tensor, shapes: list[Any] | None) -> Any:
        heights = self.seams.heights = split_rows(z.shape[3], self.transport.world)
        at = [sum(heights[:r]) for r in range(len(heights) + 1)]
        own = slice(at[self.transport.rank], at[self.transport.rank + 1])
        state = None if shapes is None else tuple(self._share_out(s, z.shape[3], at) for s in enumerate(shapes))
        video, state = self._stripe.decode_step(z[:, :, :, own], state)
        found = [self._collect(x, heights) for x in (video, *state)]
        return found[0], tuple(found[1:])

    def _share_out(self, described: tuple[int, tuple[list[int], torch.dtype]], rows: int, at: list[int]) -> Tensor:
        """This rank's rows of a state that the leader has whole."""
        i, (shape, dtype) = described
        scale, rank = shape[3] // rows, self.transport.rank
        if rank == 0:
            cuts = [self._state[i][:, :, :, a * scale : b * scale] for a, b in pairwise(at)]
            self.transport.exchange([(c.contiguous(), r) for r, c in enumerate(cuts) if r], []).wait()
            return cuts[0]
        own = [*shape[:3], (at[rank + 1] - at[rank]) * scale, shape[4]]
        part = torch.empty(own, dtype=dtype, device=self.team.device)
        self.transport.exchange([], [(part, 0)]).wait()
        return part

    def _collect(self, x: Tensor, heights: list[int]) -> Tensor:
        """All ranks' rows on the leader; on another rank, what it sent."""
        if self.transport.rank:
            self.transport.exchange([(x.contiguous(), 0)], []).wait()
            return x
        scale = x.shape[3] // heights[0]
        parts = [x.new_empty((*x.shape[:3], n * scale, x.shape[4])) for n in heights[1:]]
        self.transport.exchange([], [(part, r + 1) for r, part in enumerate(parts)]).wait()
        return torch.cat([x, *parts], dim=3)
