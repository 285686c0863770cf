"""Decoder layers: how norms, attention and MLP are wired around the residual stream.

The addition to the residual stream is part of the norm that follows it. So a block finds in `residual` the stream
without what the block before it computed last, and in `branch` that remainder, which its first norm adds. It leaves
both in the same state, and the decoder's final norm adds the last one.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from mii.modeling.attention import Attention
from mii.modeling.forward import Forward
from mii.modeling.layers import Norm
from mii.modeling.mlp import MLP, make_mlp
from mii.modeling.parameters import Module, Placement
from mii.modeling.spec import ModelSpec


class Block(Protocol):
    """A decoder layer. `adds_later`: whether its last branch is still to be added to the stream when it returns."""

    adds_later: ClassVar[bool]
    mlp: MLP

    def __call__(self, forward: Forward, first: bool) -> None:
        """Takes the stream through the layer; `first`: nothing is left in `branch` by a layer before."""
        ...


class SequentialBlock(Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`: GPT-2, Llama and most since."""

    adds_later: ClassVar[bool] = True

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        self.attention_norm = Norm(place, spec)
        self.attention = Attention(place, spec, layer)
        self.mlp_norm = Norm(place, spec)
        self.mlp = make_mlp(place, spec, layer)

    def __call__(self, forward: Forward, first: bool) -> None:
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        if first:
            self.attention_norm(hidden, residual)
        else:
            self.attention_norm(hidden, branch, residual)
        self.attention(forward, branch, hidden)
        self.mlp_norm(hidden, branch, residual)
        self.mlp(forward, branch, hidden)


BLOCKS: dict[str, type[SequentialBlock]] = {"sequential": SequentialBlock}


def make_block(place: Placement, spec: ModelSpec, layer: int) -> Block:
    """The decoder layer of a model, by `spec.block`."""
    return BLOCKS[spec.block](place, spec, layer)
