"""A pass whose rows are spread over ranks, as the transformer sees it; ``runtime.parallel`` is what implements it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from avatar_rt.ops import PackedReference

ReferenceRows = tuple[Tensor, Tensor] | PackedReference | None  # of one block: k and v [B, R, N, D], packed, or none


class Span(NamedTuple):
    """Which video rows are here: start..stop of ``frames`` latent frames of ``size`` rows each."""

    start: int
    stop: int
    frames: int
    size: int

    def cut(self, start: int, stop: int) -> Span:
        """What of these rows lies in start..stop; empty at the end when nothing does."""
        return self._replace(start=min(start, self.stop), stop=min(stop, self.stop))

    @property
    def here(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def touched(self) -> tuple[int, int]:
        """First frame with a row here, and the one after the last."""
        return self.start // self.size, -(-self.stop // self.size)


class Share(Protocol):
    """One rank's rows of a pass, and how they meet the other ranks' in attention."""

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and the one after the last, of every rank."""
        ...

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        ...

    def attend(self, qkv: Iterable[Tensor], ref: ReferenceRows, strength: float) -> Tensor:
        """Own queries over everybody's keys and the reference's. qkv: own q, k, v [B, l, N, D], in this order, taken
        one by one so that sending one overlaps computing the next; ref: this rank's heads. Returns [B, l, N, D]."""
        ...

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Own rows of all heads -> all rows of own heads [B, L, N', D]. ``whole``: of the queries too, where a rank
        would otherwise keep those of its part of the ring."""
        ...

    def to_rows(self, x: Tensor, whole: bool) -> Tensor:
        """What ``to_heads`` made of the queries -> own rows of all heads [B, l, N, D]."""
        ...

    def gather(self, x: Tensor, rows: list[int]) -> Tensor:
        """Own [B, n, C] -> everybody's, rank after rank; ``rows`` is every rank's n."""
        ...


class Spread(Protocol):
    """Spreads passes over ranks."""

    def rows(self, total: int) -> Share:
        """This rank's share of ``total`` rows."""
        ...
