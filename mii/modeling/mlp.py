"""The MLPs of a block, and the one place that chooses between them."""

from __future__ import annotations

from typing import Protocol

import torch

from mii.modeling.forward import Forward
from mii.modeling.parameters import Linear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops.activation import activation


class MLP(Protocol):
    """What a block needs of its MLP. `up_width` is how wide a row of the `up` buffer it takes."""

    up_width: int

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Writes the MLP of `x` [tokens, hidden] into `out` and returns it."""
        ...


class GatedMLP(Module):
    """`down(act(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, place: Placement, spec: ModelSpec) -> None:
        size = spec.intermediate_size
        self.up = Linear(place, spec.hidden_size, {"gate": size, "up": size}, bias=spec.mlp_bias)
        self.down = Linear(place, size, {"": spec.hidden_size}, bias=spec.mlp_bias)
        self.kind, self.up_width = spec.activation, 2 * size

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        buffers = forward.buffers
        activation(buffers.activated, self.up(buffers.up, x), self.kind, gated=True)
        return self.down(out, buffers.activated)


class PlainMLP(Module):
    """`down(act(up(x)))`."""

    def __init__(self, place: Placement, spec: ModelSpec) -> None:
        size = spec.intermediate_size
        self.up = Linear(place, spec.hidden_size, {"": size}, bias=spec.mlp_bias)
        self.down = Linear(place, size, {"": spec.hidden_size}, bias=spec.mlp_bias)
        self.kind, self.up_width = spec.activation, size

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        buffers = forward.buffers
        activation(buffers.activated, self.up(buffers.up, x), self.kind, gated=False)
        return self.down(out, buffers.activated)


MLPS: dict[str, type[GatedMLP | PlainMLP]] = {"gated": GatedMLP, "plain": PlainMLP}


def make_mlp(place: Placement, spec: ModelSpec, layer: int) -> MLP:
    """The MLP of one layer, by `spec.mlp`."""
    return MLPS[spec.mlp](place, spec)
