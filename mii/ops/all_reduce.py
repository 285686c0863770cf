"""Sum over the ranks of a tensor-parallel group: every rank gives a part and gets, bit for bit, the same whole.

x = x of rank 0 + x of rank 1 + ...
"""

from __future__ import annotations

from typing import Protocol

import torch


class Group(Protocol):
    """The ranks that share one copy of a model; `mii.parallel.group.Group` is one."""

    rank: int
    size: int
    is_local: bool
    """Whether all ranks are on one machine."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [size, *shape], in the order of the ranks."""


def all_reduce(x: torch.Tensor, group: Group) -> None:
    """Sums `x` over the ranks of a group, in place.

    Args:
        x: contiguous, of the same shape and dtype on every rank; float32, float16 or bfloat16.
        group: the ranks. All of them must call this for the same steps in the same order.

    Raises:
        ValueError: not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError(f"all_reduce: x must be contiguous; it is {tuple(x.shape)} with strides {x.stride()}")
    if x.numel():
        group.all_reduce(x)
