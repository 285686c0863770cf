"""Where weights live: tensors on the device that a checkpoint is read into, one part at a time.

A fused matrix (query, key and value; gate and up) is one tensor with named ranges of rows or columns, so each
checkpoint tensor is written straight into its place and no second copy of the model ever exists. A rank of a
tensor-parallel group has a span of each part, and reads no more than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mii.modeling.sharding import Span
from mii.ops.all_reduce import Group, all_reduce
from mii.ops.linear import LinearWeight, gated_linear, linear, pack_linear
from mii.ops.summands import Summands


class Piece(NamedTuple):
    """A range of a parameter to be filled, and what it is of the checkpoint's tensor along a dimension; None: all."""

    view: torch.Tensor
    wanted: slice | None
    dim: int = 0


class Parameter:
    """A tensor to be filled from a checkpoint. `parts` names ranges of it along `dim` and their sizes, in order; a
    `Span` says what this rank has of a part.
    """

    __slots__ = ("dim", "missing", "parts", "spans", "tensor")

    def __init__(self, tensor: torch.Tensor, parts: Mapping[str, int | Span] | None = None, dim: int = 0) -> None:
        self.tensor, self.dim = tensor, dim
        self.spans = {name: as_span(size) for name, size in (parts or {"": tensor.shape[dim]}).items()}
        self.parts = {name: span.size for name, span in self.spans.items()}
        self.missing = set(self.parts)

    def view(self, part: str = "") -> torch.Tensor:
        """One part of the tensor; the empty name means all of it."""
        if part == "":
            return self.tensor
        start = 0
        for name, size in self.parts.items():
            if name == part:
                return self.tensor.narrow(self.dim, start, size)
            start += size
        raise KeyError(part)

    def whole_shape(self, part: str = "") -> tuple[int, ...]:
        """The shape of a part on all ranks together."""
        shape = list(self.tensor.shape)
        shape[self.dim] = sum(span.whole for name, span in self.spans.items() if part in ("", name))
        return tuple(shape)

    def pieces(self, part: str = "") -> list[Piece]:
        """What to fill a part with, along `dim`. All parts together are one after the other in the checkpoint too."""
        names = [name for name in self.spans if part in ("", name)]
        if all(self.spans[name].is_whole for name in names):
            return [Piece(self.view(part), None)]
        pieces, before = [], 0
        for name in names:
            span = self.spans[name]
            pieces.append(Piece(self.view(name), slice(before + span.start, before + span.stop), self.dim))
            before += span.whole
        return pieces

    def filled(self, part: str = "") -> None:
        """Notes that a part was written."""
        self.missing.difference_update(self.parts if part == "" else (part,))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where new weights are made: device and dtype, and the ranks that have the other parts of a divided model."""

    device: torch.device
    dtype: torch.dtype
    group: Group | None = None

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Module:
    """Anything that holds parameters: as attributes, in modules that are attributes, or in lists of modules."""

    def parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter under its dotted path, in the order of the attributes."""
        for path, module in self.modules(prefix):
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield f"{path}.{name}" if path else name, value

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and every one below it, each under its dotted path."""
        yield prefix, self
        for name, value in vars(self).items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(value, Module):
                yield from value.modules(path)
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Module):
                        yield from item.modules(f"{path}.{index}")


class Linear(Module):
    """`out = x @ weight^T + bias`. The weight is [sum of parts, in_features]; it is packed once it is complete.

    `following` is the weight of the product that a step computes next. Where this rank has a span of the inputs,
    results are summed over the ranks, here or by what comes next (`leave_sum`); the bias is with the first one.
    """

    def __init__(
        self, place: Placement, in_features: int | Span, parts: Mapping[str, int | Span], bias: bool = False
    ) -> None:
        columns, rows = as_span(in_features), sum(as_span(size).size for size in parts.values())
        weight = place.empty(rows, columns.size)
        self.weight = Parameter(weight, parts) if columns.is_whole else Parameter(weight, {"": columns}, dim=1)
        self.bias = _bias(place, parts, first=columns.start == 0) if bias else None
        self.out_features = rows
        self.packed: LinearWeight | None = None
        self.following: LinearWeight | None = None
        self._bias = self.bias.tensor if self.bias is not None and self.bias.tensor.numel() else None
        self._group = None if columns.is_whole else place.group
        self._sums = True

    def leave_sum(self) -> Group | None:
        """From now on the sum over the ranks is left to what comes next; the ranks, None where there is none."""
        self._sums = False
        return self._group

    @property
    def complete(self) -> bool:
        """True when a checkpoint has filled the weight and the bias."""
        return not self.weight.missing and (self.bias is None or not self.bias.missing)

    def finish(self) -> None:
        """Called when every weight is there: brings the matrix into the layout of this device's product."""
        if self.packed is None:
            self.packed = pack_linear(self.weight.tensor)
            self.weight.tensor = self.weight.tensor.new_empty(0)

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None
        linear(out, x, self.packed, self._bias, following=self.following)
        if self._group is not None and self._sums:
            all_reduce(out, self._group)
        return out

    def to_norm(self, out: torch.Tensor, x: torch.Tensor, summands: torch.Tensor) -> torch.Tensor | Summands:
        """The same for a norm that adds it to a residual: out, or parts of it in `summands` (see `mii.ops.linear`)."""
        assert self.packed is not None
        if self._group is not None:  # the sum over the ranks takes out
            return self(out, x)
        return linear(out, x, self.packed, self._bias, following=self.following, summands=summands)

    def gated(self, out: torch.Tensor, scratch: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
        """`act(gate) * up` of a weight whose parts are gate and up, with room for both in scratch."""
        assert self.packed is not None
        gated_linear(out, scratch, x, self.packed, kind, self._bias, following=self.following)
        return out


class JointLinear(Linear):
    """`out = sum of x_i @ weight_i^T + bias_i`: one product over inputs that lie side by side, [rows, sum of inputs].

    Args:
        inputs: Names and widths of the inputs; the weights are the parts of `weight` with these names.
        out_features: Width of the result.
        biased: The inputs that have a bias; these are the parts of `bias`.
    """

    def __init__(
        self, place: Placement, inputs: Mapping[str, int | Span], out_features: int, biased: Collection[str] = ()
    ) -> None:
        spans = [as_span(size) for size in inputs.values()]
        super().__init__(place, sum(span.size for span in spans), {"": out_features})
        self.weight = Parameter(self.weight.tensor, inputs, dim=1)
        if biased:
            self.bias = _bias(place, dict.fromkeys(biased, out_features), first=not any(span.start for span in spans))
        self._group = None if all(span.is_whole for span in spans) else place.group

    def finish(self) -> None:
        super().finish()
        if self.bias is not None and self._bias is None and self.bias.tensor.numel():
            each = self.bias.tensor.view(-1, self.out_features)
            self._bias = each.sum(0, dtype=torch.promote_types(each.dtype, torch.float32)).to(each.dtype)


def as_span(size: int | Span) -> Span:
    """A dimension's size as the span of all of it."""
    return size if isinstance(size, Span) else Span.all_of(size)


def _bias(place: Placement, parts: Mapping[str, int | Span], *, first: bool) -> Parameter:
    """The biases of some parts; of what ranks sum up only the first one has any."""
    spans = {name: as_span(size) for name, size in parts.items()}
    if not first:
        spans = {name: Span(0, 0, span.whole) for name, span in spans.items()}
    return Parameter(place.empty(sum(span.size for span in spans.values())), spans)
