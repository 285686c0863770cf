"""The weights and the buffers of a mixture of experts; the layer itself is `mii.modeling.mlp.ExpertsMLP`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mii.modeling.parameters import Module, Parameter, Piece, Placement, as_span
from mii.modeling.sharding import Span
from mii.modeling.spec import ExpertsSpec, ModelSpec
from mii.ops.moe import choose_kernel
from mii.ops.moe_routing import ExpertLists, ExpertRows, Routing
from mii.ops.moe_weights import ExpertWeights, pack_experts


def routing_of(experts: ExpertsSpec) -> Routing:
    """The routing that a spec asks for."""
    return Routing(
        experts.count,
        experts.top_k,
        experts.scoring,
        experts.renormalise,
        experts.scale,
        experts.groups,
        experts.top_groups,
    )


class StackedParameter(Parameter):
    """A matrix for each of some experts, [experts, rows, columns]. Checkpoints have all in one tensor, or a tensor for
    each expert or for parts of its rows: a part is "" (all), "3" (an expert) or "3.gate" (its rows of this name).
    """

    __slots__ = ("_columns", "_rows")

    def __init__(self, tensor: torch.Tensor, rows: Mapping[str, int | Span], columns: Span) -> None:
        names = [f"{expert}.{part}".rstrip(".") for expert in range(tensor.shape[0]) for part in rows]
        super().__init__(tensor, dict.fromkeys(names, 1))
        self._rows, self._columns = dict(rows), columns

    def whole_shape(self, part: str = "") -> tuple[int, ...]:
        matrix = self._matrix(self.tensor[0]).whole_shape(part.partition(".")[2])
        return matrix if part else (self.tensor.shape[0], *matrix)

    def pieces(self, part: str = "") -> list[Piece]:
        if part:
            expert, _, name = part.partition(".")
            return self._matrix(self.tensor[int(expert)]).pieces(name)
        first = self._matrix(self.tensor[0])
        found, start = [], 0
        for view, wanted, dim in first.pieces():
            size = view.shape[dim]
            found.append(Piece(self.tensor.narrow(dim + 1, start, size), wanted, dim + 1))
            start += size
        return found

    def _matrix(self, tensor: torch.Tensor) -> Parameter:
        """One expert's."""
        if self._columns.is_whole:
            return Parameter(tensor, self._rows)
        return Parameter(tensor, {"": self._columns}, dim=1)

    def view(self, part: str = "") -> torch.Tensor:
        if part == "":
            return self.tensor
        expert, _, name = part.partition(".")
        return self._matrix(self.tensor[int(expert)]).view(name)

    def filled(self, part: str = "") -> None:
        if part in self.parts:
            self.missing.discard(part)
        else:
            self.missing = {name for name in self.missing if part and not name.startswith(f"{part}.")}


class ExpertStack(Module):
    """The same matrix of every expert: [experts, sum of parts, in_features], packed once it is complete."""

    def __init__(
        self,
        place: Placement,
        experts: int,
        in_features: int | Span,
        parts: Mapping[str, int | Span],
        *,
        gated: bool,
    ) -> None:
        columns, rows = as_span(in_features), sum(as_span(size).size for size in parts.values())
        self.weight = StackedParameter(place.empty(experts, rows, columns.size), parts, columns)
        self.packed: ExpertWeights | None = None
        self._gated = gated

    @property
    def complete(self) -> bool:
        """True when a checkpoint has filled every expert."""
        return not self.weight.missing

    @property
    def weights(self) -> ExpertWeights:
        assert self.packed is not None
        return self.packed

    def finish(self) -> None:
        """Called when every weight is there: brings the matrices into the layout of this device's products."""
        if self.packed is None:
            self.packed = pack_experts(self.weight.tensor, gated=self._gated)
            self.weight.tensor = self.weight.tensor.new_empty(0)


@dataclass(slots=True)
class ExpertBuffers:
    """What the experts of a layer write in one step; a row is a token and one of its choices, sorted by expert.

    Args:
        rows: The step's lists.
        logits: [tokens, experts]. hidden: [rows, intermediate]. parts: [tokens * top_k, hidden].
        shared: [tokens, hidden], of the shared expert. shared_gate: [tokens, 1].
    """

    rows: ExpertRows
    logits: torch.Tensor
    hidden: torch.Tensor
    parts: torch.Tensor
    shared: torch.Tensor
    shared_gate: torch.Tensor


class ExpertMemory:
    """Memory of the experts for the largest step; the layers take turns in it."""

    def __init__(self, spec: ModelSpec, place: Placement, max_tokens: int, tensors: Mapping[str, torch.Tensor]) -> None:
        assert spec.experts is not None
        experts, self._place = spec.experts, place
        self.routing, self._features = routing_of(experts), (spec.hidden_size, experts.intermediate_size)
        self._lists = ExpertLists(self.routing, max_tokens, place.device)
        self._logits, self._hidden, self._parts, self._shared, self._shared_gate = (
            tensors[name] for name in self.shapes(spec, max_tokens)
        )

    @staticmethod
    def shapes(spec: ModelSpec, max_tokens: int) -> dict[str, tuple[int, int]]:
        """Rows and width of the tensors that it is made from, by the names that they have in an arena."""
        assert spec.experts is not None
        experts = spec.experts
        pairs, shared = max_tokens * experts.top_k, max_tokens if experts.shared_size else 0
        return {
            "experts.logits": (max_tokens, experts.count),
            "experts.hidden": (pairs, experts.intermediate_size),
            "experts.parts": (pairs, spec.hidden_size),
            "experts.shared": (shared, spec.hidden_size),
            "experts.shared_gate": (shared, 1),
        }

    def views(self, tokens: int) -> ExpertBuffers:
        """The buffers of a step of so many tokens, whose kernels follow from that."""
        chosen = choose_kernel(self.routing, tokens, self._features, self._place.dtype, self._place.device)
        pairs = tokens * self.routing.top_k
        return ExpertBuffers(
            rows=self._lists.rows(tokens, *chosen),
            logits=self._logits[:tokens],
            hidden=self._hidden[:pairs],
            parts=self._parts[:pairs],
            shared=self._shared[:tokens],
            shared_gate=self._shared_gate[:tokens],
        )

    @property
    def num_bytes(self) -> int:
        """Of its own memory, the lists."""
        return self._lists.num_bytes
