"""The numbers that ranks exchange within a step: sums and gathers by torch.distributed (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from mii.ops import native

STEP_SECONDS = 6.0
"""How long a rank waits for the others within a step before it takes them for dead."""


class Group:
    """One rank's place among those that share a copy of a model; see `mii.ops.all_reduce.Group`.

    Args:
        store: torch's key-value store, which all ranks see, with the prefix of this group.
        rank: which one this is.
        size: how many there are.
        device: where the tensors are.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.is_local = len(set(meet(store, rank, size, "machine", _machine()))) == 1
        """Whether all ranks are on this machine."""
        self._ranks = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size, self.is_local)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""
        native.aside(lambda: self._ranks.allreduce([tensor]).wait())

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [size, *shape], in the order of the ranks."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._ranks.allgather([list(gathered.unbind())], [tensor.contiguous()]).wait()
        return gathered

    def close(self) -> None:
        """Gives the connections back."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.shutdown()


def meet(store: Any, rank: int, size: int, name: str, mine: str) -> list[str]:
    """What every rank says under a name, once all have said it."""
    store.set(f"{name}-{rank}", mine)
    return [store.get(f"{name}-{other}").decode() for other in range(size)]


def _machine() -> str:
    """Machines are told apart by their kernels, and containers on one by the namespaces that matter here."""
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid", "ipc")]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespaces}"


def _gloo(store: Any, rank: int, size: int, is_local: bool) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if is_local and not interface:
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
    elif interface:
        options._devices = [gloo.create_device(interface=interface)]
    else:
        options._devices = [gloo.create_default_device()]
    options._timeout = timedelta(seconds=STEP_SECONDS)
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
