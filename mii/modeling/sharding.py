"""How a model is divided among the ranks of a tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

Matrices that widen (query, key, value; gate and up; the head) are split by output rows, those that narrow again
(attention output, down) by input columns, so a rank computes a part of every layer and the parts add up. Attention is
split between heads. Nothing has to divide evenly: with fewer key/value heads than ranks each is held by several ranks,
which share the query heads of its group.

>>> [split_heads(9, 3, rank, 2)[0] for rank in range(2)]
[Span(start=0, size=6, whole=9), Span(start=6, size=3, whole=9)]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mii.errors import PlacementError

_UNIT = 64  # rows or columns that stay together: whole panels of the kernels, whole cache lines
_UNITS_A_RANK = 4  # with fewer the unit is halved, for the sake of balance


@dataclass(frozen=True, slots=True)
class Span:
    """`size` of `whole` things, from `start` on: what one rank holds of a dimension."""

    start: int
    size: int
    whole: int

    @classmethod
    def all_of(cls, whole: int) -> Span:
        return cls(0, whole, whole)

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def is_whole(self) -> bool:
        return self.size == self.whole

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, factor: int) -> Span:
        """The same of a dimension in which each thing takes `factor` places."""
        return Span(self.start * factor, self.size * factor, self.whole * factor)

    def local(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that lie in it, counted from its start."""
        return [index - self.start for index in ids if self.start <= index < self.stop]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a model: query heads, key/value heads, columns of the MLP, tokens of the vocabulary."""

    rank: int
    size: int
    q_heads: Span
    kv_heads: Span
    columns: Span
    vocabulary: Span

    @property
    def first_of_keys(self) -> bool:
        """Whether no rank before this one has the same key/value heads."""
        return self.q_heads.start == self.kv_heads.start * (self.q_heads.whole // self.kv_heads.whole)


def split(whole: int, rank: int, size: int) -> Span:
    """A rank's share of a dimension, in units that suit the kernels.

    Raises:
        PlacementError: there are more ranks than places.
    """
    if whole < size:
        raise PlacementError(
            f"tensor_parallel={size}: {whole} columns cannot be divided among so many; use 1 to {whole}"
        )
    unit = _UNIT
    while unit > 1 and -(-whole // unit) < _UNITS_A_RANK * size:
        unit //= 2
    units = -(-whole // unit)
    start, stop = (min(whole, _first(units, each, size) * unit) for each in (rank, rank + 1))
    return Span(start, stop - start, whole)


def split_heads(q_heads: int, kv_heads: int, rank: int, size: int) -> tuple[Span, Span]:
    """A rank's query heads and key/value heads; on every rank as many query heads belong to each key/value head.

    Raises:
        PlacementError: there are more ranks than query heads.
    """
    if size > q_heads:
        raise PlacementError(
            f"tensor_parallel={size}: the model has {q_heads} attention heads, a rank needs one at least; use 1 to "
            f"{q_heads}"
        )
    group = q_heads // kv_heads
    if size <= kv_heads:
        kv = _share(kv_heads, rank, size)
        return kv.times(group), kv
    head = next(head for head in range(kv_heads) if rank < _first(size, head + 1, kv_heads))
    first = _first(size, head, kv_heads)
    queries = _share(group, rank - first, _first(size, head + 1, kv_heads) - first)
    return Span(head * group + queries.start, queries.size, q_heads), Span(head, 1, kv_heads)


def _share(whole: int, rank: int, size: int) -> Span:
    start, stop = _first(whole, rank, size), _first(whole, rank + 1, size)
    return Span(start, stop - start, whole)


def _first(whole: int, rank: int, size: int) -> int:
    """Where a rank's share begins when `whole` things are dealt out; the first ranks get those that are left over."""
    return whole // size * rank + min(rank, whole % size)
