"""The small layers that families are wired from. Each writes into buffers of the step's arena; none allocates.

A layer's call takes the buffers it reads and writes, so its signature stays that of the mathematics; attention and MLPs
(`attention.py`, `mlp.py`) take the step's `Forward` too, which holds what is ragged about the batch. `blocks.py` wires
them into decoder layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch

from mii.modeling.parameters import Module, Parameter, Placement
from mii.modeling.sharding import Span
from mii.modeling.spec import ModelSpec
from mii.ops import abi, native
from mii.ops.all_reduce import Group, StartedSum, all_reduce_norm
from mii.ops.embedding import embedding
from mii.ops.linear import LinearWeight, linear, pack_linear
from mii.ops.norm import norm
from mii.ops.shard_norm import norm_shards
from mii.ops.summands import Summands


class PartOfSum(Protocol):
    """What computes a rank's part of a sum; `leave_sum` as in `Linear`."""

    def leave_sum(self) -> Group | None: ...


class Norm(Module):
    """A norm of the kind that the model has, with the residual addition before it when one is given.

    `branch`: what is added is normed by itself first, with a weight of its own. `add_up`: what is added is summed over
    the ranks first.
    """

    def __init__(self, place: Placement, spec: ModelSpec, width: int | None = None, *, branch: bool = False) -> None:
        width = spec.hidden_size if width is None else width
        self.branch = Parameter(place.empty(width)) if branch else None
        self.weight = Parameter(place.empty(width)) if spec.norm_weight else None
        self.bias = Parameter(place.empty(width)) if spec.norm_bias else None
        self.eps, self.kind = spec.norm_eps, abi.NORMS[spec.norm]
        self.group: Group | None = None

    def add_up(self, part: PartOfSum) -> None:
        """Takes over the sum over the ranks of what it adds."""
        if self.branch is None:
            self.group = part.leave_sum()

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor | Summands, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Norms x into out, after adding it to the residual."""
        if self.group is not None and residual is not None:
            assert isinstance(x, torch.Tensor), "what ranks sum up is never left in parts"
            all_reduce_norm(out, x, group=self.group, residual=residual, **self._options())
        else:
            x_weight = None if self.branch is None else self.branch.tensor
            norm(out, x, residual=residual, x_weight=x_weight, **self._options())
        return out

    def of_started(
        self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, started: StartedSum | None
    ) -> torch.Tensor:
        """The same of an x whose sum over the ranks has been begun; None: x is the sum."""
        if self.group is not None and started is not None:
            all_reduce_norm(out, x, group=self.group, residual=residual, started=started, **self._options())
        else:
            norm(out, x, residual=residual, **self._options())
        return out

    def _options(self) -> dict[str, Any]:
        weight = None if self.weight is None else self.weight.tensor
        bias = None if self.bias is None else self.bias.tensor
        return {"weight": weight, "bias": bias, "eps": self.eps, "kind": self.kind}


class RowNorm(Module):
    """A norm over the features of all heads, in place; of a rank's part with the sums of all ranks.

    `counts`: whether no rank before this one has the same features.
    """

    def __init__(self, place: Placement, spec: ModelSpec, features: Span, *, counts: bool) -> None:
        self.weight = Parameter(place.empty(features.size), {"": features})
        self.eps, self.kind = spec.norm_eps, abi.NORMS[spec.norm]
        self._features, self._counts = features, counts
        self._group = None if spec.shard is None else place.group

    def __call__(self, x: torch.Tensor) -> None:
        weight = self.weight.tensor
        if self._group is None:
            norm(x, x, weight, eps=self.eps, kind=self.kind)
            return
        work = partial(
            norm_shards, x, weight, eps=self.eps, kind=self.kind, whole=self._features.whole, counts=self._counts,
            group=self._group,
        )  # fmt: skip
        native.aside(work)


class BranchNorm(Module):
    """`residual += norm(x)`: for the output of a layer that takes the stream as it is."""

    def __init__(self, place: Placement, spec: ModelSpec) -> None:
        self.branch = Parameter(place.empty(spec.hidden_size))
        self.eps, self.kind = spec.norm_eps, abi.NORMS[spec.norm]

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm(None, x, None, eps=self.eps, residual=residual, kind=self.kind, x_weight=self.branch.tensor)
        return residual


class Embedding(Module):
    """Token embeddings [vocab, width], with what a model has besides: a factor, learned positions, a projection,
    a norm.
    """

    def __init__(self, place: Placement, spec: ModelSpec) -> None:
        hidden, width = spec.hidden_size, spec.embedding_size
        self.weight = Parameter(place.empty(spec.vocab_size, width or hidden))
        self.projection = Parameter(place.empty(hidden, width)) if width else None
        self.positions = Parameter(place.empty(spec.learned_positions, hidden)) if spec.learned_positions else None
        self.norm = Norm(place, spec) if spec.embedding_norm else None
        self._offset = spec.position_offset
        self._scale = float(torch.tensor(spec.embedding_scale, dtype=place.dtype))
        self._table: torch.Tensor | None = None

    def finish(self) -> None:
        """Called when every weight is there. A projection is applied to the whole table once."""
        table = self.weight.tensor
        self._table = table if self.projection is None else table @ self.projection.tensor.t()

    def __call__(self, out: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self._table is not None
        embedding(
            out,
            self._table,
            ids,
            scale=self._scale,
            position_table=None if self.positions is None else self.positions.tensor,
            positions=positions,
            position_offset=self._offset,
        )
        return out if self.norm is None else self.norm(out, out)


class TiedHead(Module):
    """Logits by the embedding's own matrix, which is packed once more where a product wants another layout."""

    def __init__(self, place: Placement, vocab: Span, bias: bool = False) -> None:
        self.bias = Parameter(place.empty(vocab.size), {"": vocab}) if bias else None
        self._vocab = vocab
        self.packed: LinearWeight | None = None
        self.following: LinearWeight | None = None

    def finish(self, table: torch.Tensor) -> None:
        """Called when every weight is there, with the embedding's, [vocab, hidden]."""
        self.packed = pack_linear(table[self._vocab.slice])

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None
        linear(out, x, self.packed, None if self.bias is None else self.bias.tensor, following=self.following)
        return out
