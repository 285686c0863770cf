"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mii.modeling.spec import ModelSpec


class Target(NamedTuple):
    """Where a checkpoint tensor goes, and how it is laid out there.

    Args:
        path: Path of a parameter.
        part: The part of it; empty: all of it.
        rows: Row r of the part is the stored row `rows[r]`; None: the same order.
        transposed: The tensor is stored as [in, out].
    """

    path: str
    part: str = ""
    rows: torch.Tensor | None = None
    transposed: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint's tensor must have for a part of this shape."""
        return shape[::-1] if self.transposed else shape

    def slices(self, dim: int, wanted: slice | None, dims: int) -> tuple[slice, ...] | None:
        """Slices of the checkpoint's tensor, of `dims` dimensions, around a range of the part; None: all of it."""
        if wanted is None:
            return None
        if self.rows is not None and dim == 0:
            rows = self.rows[wanted]
            wanted = slice(int(rows.min()), int(rows.max()) + 1) if len(rows) else slice(0, 0)
        stored = 1 - dim if self.transposed and dims == 2 else dim
        return (*[slice(None)] * stored, wanted)

    def arranged(self, stored: torch.Tensor, dim: int = 0, wanted: slice | None = None) -> torch.Tensor:
        """The part, or a range of it along a dimension, out of `slices` of the checkpoint's tensor."""
        tensor = stored.t() if self.transposed and stored.dim() == 2 else stored
        if self.rows is None:
            return tensor
        if wanted is None or dim != 0:
            return tensor[self.rows]
        rows = self.rows[wanted]
        return tensor[rows - rows.min()] if len(rows) else tensor[:0]


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Args:
        name: `model_type` in the config.
        architectures: Names in the config's `architectures`.
        read_spec: Reads the config; raises CheckpointError naming the field that is missing, wrong or not supported.
        weights: Checkpoint tensor names and their targets, for a spec.
        ignored: Ends of tensor names that checkpoints may hold and nothing needs (tables that are computed).
        left_out: Beginnings of names of parts that are not served (a vision tower).
        canonical: The name in `weights` of a tensor that older or partial checkpoints call otherwise.
        stacked: As `weights`, for checkpoints that keep all experts of a layer in one tensor.
        apart: As `weights`, for checkpoints that keep apart what makes keys and what makes values.
    """

    name: str
    architectures: tuple[str, ...]
    read_spec: Callable[[Mapping[str, Any]], ModelSpec]
    weights: Callable[[ModelSpec], dict[str, Target]]
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    left_out: tuple[str, ...] = ()
    canonical: Callable[[str], str] = str
    stacked: Callable[[ModelSpec], dict[str, Target]] | None = None
    apart: Callable[[ModelSpec], dict[str, Target]] | None = None

    def targets(self, spec: ModelSpec, names: Collection[str]) -> dict[str, Target]:
        """`weights`, `stacked` or `apart`: the one that misses fewest of a checkpoint's canonical names."""
        layouts = (layout(spec) for layout in (self.weights, self.stacked, self.apart) if layout is not None)
        return min(layouts, key=lambda targets: len(targets.keys() - names))
