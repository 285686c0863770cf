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


class DenseMLP(Module):
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`, with gate and up as one product.

    Without the last product (`project=False`) the layer ends in `activate`, and its block goes on from there.
    """

    def __init__(self, place: Placement, spec: ModelSpec, *, project: bool = True) -> None:
        size, gated = spec.intermediate_size, spec.mlp == "gated"
        self.up = Linear(place, spec.hidden_size, {"gate": size, "up": size} if gated else {"": size}, spec.mlp_bias)
        self.down = Linear(place, size, {"": spec.hidden_size}, spec.mlp_bias) if project else None
        self.kind, self.gated, self.up_width = spec.activation, gated, self.up.out_features

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self.down is not None
        return self.down(out, self.activate(forward, x))

    def activate(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """What the last product is made of, in the step's buffer for it, [tokens, intermediate]."""
        buffers = forward.buffers
        if self.gated:
            return self.up.gated(buffers.activated, buffers.up, x, self.kind)
        activation(buffers.activated, self.up(buffers.up, x), self.kind, gated=False)
        return buffers.activated


def make_mlp(place: Placement, spec: ModelSpec, layer: int) -> MLP:
    """The MLP of one layer, by `spec.mlp`."""
    return DenseMLP(place, spec)
