"""The MLPs of a block, and the one place that chooses between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from mii.modeling.experts import ExpertBuffers, ExpertStack, routing_of
from mii.modeling.forward import Forward
from mii.modeling.parameters import Linear, Module, Parameter, Placement
from mii.modeling.sharding import Span
from mii.modeling.spec import ExpertsSpec, ModelSpec
from mii.ops.activation import activation
from mii.ops.all_reduce import Group, all_reduce
from mii.ops.linear import pieces
from mii.ops.moe import moe_combine, moe_mlp
from mii.ops.moe_routing import route
from mii.ops.norm import adds_parts
from mii.ops.summands import Summands


class MLP(Protocol):
    """What a block needs of its MLP. `up_width` is how wide a row of the `up` buffer it takes."""

    up_width: int

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Writes the MLP of `x` [tokens, hidden] into `out` and returns it."""
        ...

    def to_norm(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor | Summands:
        """The same for a norm that adds it to a residual: as `Linear.to_norm`."""
        ...

    def leave_sum(self) -> Group | None:
        """As `Linear.leave_sum`."""
        ...


class DenseMLP(Module):
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`, with gate and up as one product.

    Without the last product (`project=False`) the layer ends in `activate`, and its block goes on from there. `size` is
    its width where that is not the model's `intermediate_size`.
    """

    def __init__(self, place: Placement, spec: ModelSpec, *, project: bool = True, size: Span | None = None) -> None:
        gated = spec.mlp == "gated"
        span = spec.mlp_span if size is None else size
        self.size = span.size
        self.up = Linear(place, spec.hidden_size, {"gate": span, "up": span} if gated else {"": span}, spec.mlp_bias)
        self.down = Linear(place, span, {"": spec.hidden_size}, spec.mlp_bias) if project else None
        self.kind, self.gated, self.up_width = spec.activation, gated, self.up.out_features

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self.down is not None
        rows, most = x.shape[0], forward.buffers.activated.shape[0]
        if rows <= most:
            return self.down(out, self.activate(forward, x))
        for piece in pieces(rows, most):
            self.down(out[piece], self.activate(forward, x[piece]))
        return out

    def to_norm(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor | Summands:
        assert self.down is not None
        if x.shape[0] > forward.buffers.activated.shape[0]:
            return self(forward, out, x)
        return self.down.to_norm(out, self.activate(forward, x), forward.buffers.summands)

    def leave_sum(self) -> Group | None:
        assert self.down is not None
        return self.down.leave_sum()

    def activate(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """What the last product is made of, in the step's buffer for it, [rows of x, intermediate]."""
        rows, up, activated = x.shape[0], forward.buffers.up, forward.buffers.activated
        if rows < activated.shape[0]:  # a piece of a step
            up, activated = up[:rows], activated[:rows]
        if activated.shape[1] != self.size:  # the model has wider MLPs too
            up, activated = up[:, : self.up_width], activated[:, : self.size]
        if self.gated:
            return self.up.gated(activated, up, x, self.kind)
        activation(activated, self.up(up, x), self.kind, gated=False)
        return activated


class ExpertsMLP(Module):
    """`sum over the chosen experts of weight * down(act(gate(x)) * up(x))`, and a shared expert, which may be behind a
    sigmoid gate.

    Mixtral (Jiang et al., arXiv 2401.04088) and Qwen's models with experts; DeepSeekMoE (Dai et al., arXiv 2401.06066)
    for the shared expert.
    """

    def __init__(self, place: Placement, spec: ModelSpec, experts: ExpertsSpec) -> None:
        hidden, size = spec.hidden_size, experts.span
        apart = replace(place, group=None)  # the shared expert's part is summed with all experts' over the ranks
        self.router = Linear(place, hidden, {"": experts.count})
        self.shared = DenseMLP(apart, spec, size=experts.shared_span) if experts.shared_size else None
        self.shared_gate = Linear(place, hidden, {"": 1}) if experts.shared_size and experts.shared_gate else None
        self.up = ExpertStack(place, experts.count, hidden, {"gate": size, "up": size}, gated=True)
        self.down = ExpertStack(place, experts.count, size, {"": hidden}, gated=False)
        self.routing = routing_of(experts)
        bias = torch.empty(experts.count, dtype=torch.float32, device=place.device) if experts.choice_bias else None
        self.choice_bias = None if bias is None else Parameter(bias)
        self._group, self._sums = None if size.is_whole else place.group, True
        self.kind, self.up_width = spec.activation, 0 if self.shared is None else self.shared.up_width

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shared, gate, buffers = None, None, self._route(forward, x)
        if self.shared is not None:
            shared = self.shared(forward, buffers.shared, x)
        if self.shared_gate is not None:
            gate = self.shared_gate(buffers.shared_gate, x)
        parts, counts = self._multiply(buffers, x), forward.counts
        moe_combine(out, parts, top_k=self.routing.top_k, shared=shared, shared_gate=gate, counts=counts)
        if self._group is not None and self._sums:
            all_reduce(out, self._group)
        return out

    def to_norm(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor | Summands:
        if self.shared is not None or self._group is not None or not adds_parts(x.device):
            return self(forward, out, x)
        parts = self._multiply(self._route(forward, x), x)
        return Summands(parts.unflatten(0, (-1, self.routing.top_k)).transpose(0, 1), out.dtype)

    def _route(self, forward: Forward, x: torch.Tensor) -> ExpertBuffers:
        """Chooses the experts of each token; gives the buffers of the step."""
        buffers = forward.buffers.experts
        assert buffers is not None
        bias = None if self.choice_bias is None else self.choice_bias.tensor
        logits = self.router(buffers.logits, x)
        route(buffers.rows, logits, self.routing, bias=bias, counts=forward.counts)
        return buffers

    def _multiply(self, buffers: ExpertBuffers, x: torch.Tensor) -> torch.Tensor:
        """What its experts give a token, weighted: [tokens * top_k, hidden], those of a token one after the other."""
        parts, hidden = buffers.parts, buffers.hidden
        moe_mlp(parts, hidden, x, self.up.weights, self.down.weights, buffers.rows, self.routing, self.kind)
        return parts

    def leave_sum(self) -> Group | None:
        self._sums = False
        return self._group


def make_mlp(place: Placement, spec: ModelSpec, layer: int) -> MLP:
    """The MLP of one layer: experts where `spec.experts` has them, else by `spec.mlp`."""
    if spec.experts is not None and spec.experts.layers[layer]:
        return ExpertsMLP(place, spec, spec.experts)
    return DenseMLP(place, spec)
