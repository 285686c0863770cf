"""Where weights live: tensors on the device that a checkpoint is read into, one part at a time.

A fused matrix (query, key and value; gate and up) is one tensor with named ranges of rows or columns, so each
checkpoint tensor is written straight into its place and no second copy of the model ever exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from mii.ops.linear import LinearWeight, gated_linear, linear, pack_linear


class Parameter:
    """A tensor to be filled from a checkpoint. `parts` names ranges of it along `dim` and their sizes, in order."""

    __slots__ = ("dim", "missing", "parts", "tensor")

    def __init__(self, tensor: torch.Tensor, parts: Mapping[str, int] | None = None, dim: int = 0) -> None:
        self.tensor, self.dim = tensor, dim
        self.parts = dict(parts) if parts else {"": tensor.shape[dim]}
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

    def filled(self, part: str = "") -> None:
        """Notes that a part was written."""
        self.missing.difference_update(self.parts if part == "" else (part,))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where new weights are made: device and dtype."""

    device: torch.device
    dtype: torch.dtype

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

    `following` is the weight of the product that a step computes next.
    """

    def __init__(self, place: Placement, in_features: int, parts: Mapping[str, int], bias: bool = False) -> None:
        rows = sum(parts.values())
        self.weight = Parameter(place.empty(rows, in_features), parts)
        self.bias = Parameter(place.empty(rows), parts) if bias else None
        self.out_features = rows
        self.packed: LinearWeight | None = None
        self.following: LinearWeight | None = None
        self._bias: torch.Tensor | None = None if self.bias is None else self.bias.tensor

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
        return out

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
        self, place: Placement, inputs: Mapping[str, int], out_features: int, biased: Collection[str] = ()
    ) -> None:
        super().__init__(place, sum(inputs.values()), {"": out_features})
        self.weight = Parameter(self.weight.tensor, inputs, dim=1)
        if biased:
            self.bias = Parameter(place.empty(len(biased) * out_features), dict.fromkeys(biased, out_features))

    def finish(self) -> None:
        super().finish()
        if self.bias is not None and self._bias is None:
            each = self.bias.tensor.view(-1, self.out_features)
            self._bias = each.sum(0, dtype=torch.promote_types(each.dtype, torch.float32)).to(each.dtype)
