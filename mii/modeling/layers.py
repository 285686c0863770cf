"""The small layers that families are wired from. Each writes into buffers of the step's arena; none allocates.

A layer's call takes the buffers it reads and writes, so its signature stays that of the mathematics; attention and MLPs
(`attention.py`, `mlp.py`) take the step's `Forward` too, which holds what is ragged about the batch. `blocks.py` wires
them into decoder layers.
"""

from __future__ import annotations

import torch

from mii.modeling.parameters import Module, Parameter, Placement
from mii.modeling.spec import ModelSpec
from mii.ops import abi
from mii.ops.embedding import embedding
from mii.ops.linear import LinearWeight, linear, pack_linear
from mii.ops.norm import norm


class Embedding(Module):
    """Token embeddings, [vocab, hidden]."""

    def __init__(self, place: Placement, vocab: int, width: int) -> None:
        self.weight = Parameter(place.empty(vocab, width))

    def __call__(self, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        embedding(out, self.weight.tensor, ids)
        return out


class TiedHead(Module):
    """Logits by the embedding's own matrix, which is packed once more where a product wants another layout."""

    def __init__(self, place: Placement, vocab: int, bias: bool = False) -> None:
        self.bias = Parameter(place.empty(vocab)) if bias else None
        self._packed: LinearWeight | None = None

    def finish(self, table: torch.Tensor) -> None:
        """Called when every weight is there, with the embedding's, [vocab, hidden]."""
        self._packed = pack_linear(table)

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self._packed is not None
        linear(out, x, self._packed, None if self.bias is None else self.bias.tensor)
        return out


class Norm(Module):
    """A norm of the kind that the model has, with the residual addition before it when one is given."""

    def __init__(self, place: Placement, spec: ModelSpec, width: int | None = None) -> None:
        width = spec.hidden_size if width is None else width
        self.weight = Parameter(place.empty(width)) if spec.norm_weight else None
        self.bias = Parameter(place.empty(width)) if spec.norm_bias else None
        self.eps, self.kind = spec.norm_eps, abi.NORMS[spec.norm]

    def __call__(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.tensor
        bias = None if self.bias is None else self.bias.tensor
        norm(out, x, weight, eps=self.eps, bias=bias, residual=residual, kind=self.kind)
        return out
