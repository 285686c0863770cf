"""Sum over the ranks of a tensor-parallel group: every rank gives a part and gets, bit for bit, the same whole.

x = x of rank 0 + x of rank 1 + ...

What serves is the group's matter: memory that the ranks share, or a library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mii.ops import abi
from mii.ops.norm import norm, norm_arguments


class StartedSum(Protocol):
    """A sum over the ranks that is under way. Sums are taken in the order in which they were begun, each once."""

    def wait(self) -> None:
        """What the device does next finds the sum in the tensor."""

    def norm(self, norm: ctypes.Structure) -> bool:
        """Norms the sum, by an `abi.MiiNorm` of which x is the tensor. False: nothing is normed, and the tensor is the
        sum.
        """


class Group(Protocol):
    """The ranks that share one copy of a model; `mii.parallel.group.Group` is one."""

    rank: int
    size: int
    local_size: int
    """How many ranks are on this machine."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the device for what ranks exchange, as far as this object took them."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""

    def overlaps(self, num_bytes: int, *, captured: bool = False) -> bool:
        """Whether a sum of so many bytes that is begun early goes on beside what the device computes next, and is worth
        it. `captured`: in a step that becomes a CUDA graph.
        """

    def start_all_reduce(self, tensor: torch.Tensor) -> StartedSum | None:
        """Begins to sum a tensor over the ranks, in place. None: the sum is there."""

    def all_reduce_norm(self, norm: ctypes.Structure) -> bool:
        """Sums the x of an `abi.MiiNorm` over the ranks and norms the sum. False: nothing was done."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [size, *shape], in the order of the ranks."""

    def wait(self, event: torch.cuda.Event) -> None:
        """Until an event on the device, or the end of a rank that it would wait for in vain."""


def of_first(group: Group | None, numbers: Sequence[float], device: torch.device) -> list[float]:
    """Rank 0's numbers, bit for bit, on every rank: what each would measure for itself and all must agree on.

    Args:
        group: the ranks, all of which call this at the same point; None: there is one.
        numbers: of this rank, as many on every one.
        device: of the group's tensors.
    """
    if group is None:
        return list(numbers)
    mine = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    found: list[float] = group.all_gather(mine)[0].tolist()
    return found


def all_reduce(x: torch.Tensor, group: Group) -> None:
    """Sums `x` over the ranks of a group, in place.

    Args:
        x: contiguous, of the same shape and dtype on every rank; float32, float16 or bfloat16.
        group: the ranks. All of them must call this for the same steps in the same order.

    Raises:
        ValueError: not contiguous.
    """
    _check(x)
    if x.numel():
        group.all_reduce(x)


def start_all_reduce(x: torch.Tensor, group: Group | None) -> StartedSum | None:
    """Begins `all_reduce(x, group)`; no group: x is a sum already.

    Returns:
        What gives the sum, before anything else reads x or writes to it. None: x is the sum.

    Raises:
        ValueError: as `all_reduce`.
    """
    if group is None or not x.numel():
        return None
    _check(x)
    return group.start_all_reduce(x)


def _check(x: torch.Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"all_reduce: x must be contiguous; it is {tuple(x.shape)} with strides {x.stride()}")


def all_reduce_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    group: Group,
    eps: float,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    kind: int = abi.RMS,
    started: StartedSum | None = None,
) -> None:
    """`all_reduce(x)`, then `norm(out, x, ...)` of it with a residual: as one kernel where the group has one.

    Args:
        out, weight, eps, residual, bias, kind: as in `mii.ops.norm.norm`.
        x: contiguous [rows, width], of the same shape and dtype on every rank. What it holds afterwards is open.
        group: the ranks.
        started: the sum of x where it has been begun, by `start_all_reduce`.

    Raises:
        ValueError: x is not contiguous, or what `norm` raises.
    """
    options: dict[str, Any] = {"eps": eps, "bias": bias, "residual": residual, "kind": kind}
    args = norm_arguments(out, x, weight, **options)
    if started is not None:
        if args is not None and started.norm(args):
            return
        if args is None:
            started.wait()
    elif args is not None and x.numel() and x.is_cuda and group.all_reduce_norm(args):
        return
    else:
        all_reduce(x, group)
    norm(out, x, weight, **options)
