"""The numbers that ranks exchange within a step: sums and gathers in memory that the ranks of one host share, and by
torch.distributed (gloo on CPUs, NCCL on GPUs).
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from mii.ops import native
from mii.ops.all_reduce import StartedSum
from mii.parallel.meeting import meet, this_machine
from mii.parallel.pages import STEP_SECONDS, SharedPages, open_pages
from mii.parallel.peers import PeerMemory, open_peers

# Bytes of a sum up to which it is not begun early: what computes a half meanwhile would read all weights for few rows.
MOST_ALONE = 4 << 20


class Group:
    """One rank's place among those that share a copy of a model; see `mii.ops.all_reduce.Group`.

    Args:
        store: torch's key-value store, which all ranks see, with the prefix of this group.
        rank: which one this is.
        size: how many there are.
        device: where the tensors are.
        address: by which ranks on other machines reach this one; empty: found out by gloo and NCCL.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, address: str = "") -> None:
        self.rank, self.size = rank, size
        machines = meet(store, rank, size, "machine", this_machine())
        self.local_size = machines.count(machines[rank])
        """How many ranks are on this machine."""
        self.is_local = self.local_size == size
        self._store = PrefixStore("peers", store)
        self._is_cuda = device.type == "cuda"
        self._peers: PeerMemory | SharedPages | None
        if self._is_cuda:
            self._peers = open_peers(self._store, rank, size, device, self.is_local)
        else:
            self._peers = open_pages(self._store, rank, size, self.is_local)
        self._ranks = (
            _nccl(store, rank, size)
            if self._is_cuda
            else _gloo(store, rank, size, "127.0.0.1" if self.is_local else address)
        )
        meet(store, rank, size, "connected", "")  # who goes on alone may end while others still connect to it

    @property
    def num_bytes(self) -> int:
        """Bytes of the device for what ranks exchange, as far as this object took them."""
        return 0 if self._peers is None else self._peers.num_bytes

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""
        if self._peers is None or not self._peers.all_reduce(tensor):
            native.aside(lambda: self._ranks.allreduce([tensor]).wait())

    def overlaps(self, num_bytes: int, *, captured: bool = False) -> bool:
        """See `mii.ops.all_reduce.Group`: on two GPUs by their copy engines, else by NCCL, which has a stream of its
        own, unless the sum of a whole step, as one kernel with the norm that follows, is the faster way.
        """
        if not self._is_cuda or num_bytes <= MOST_ALONE:
            return False
        copies = self._peers.copies if isinstance(self._peers, PeerMemory) else None
        return (copies is not None and not captured and copies.takes(num_bytes)) or self._is_for_nccl(num_bytes)

    def _is_for_nccl(self, num_bytes: int) -> bool:
        """Whether NCCL sums such a half of a step on GPUs: what two of them give is too large for the peers' memory."""
        return not (isinstance(self._peers, PeerMemory) and self._peers.takes(2 * num_bytes))

    def start_all_reduce(self, tensor: torch.Tensor) -> StartedSum | None:
        """See `mii.ops.all_reduce.Group`."""
        started = self._peers.start(tensor) if isinstance(self._peers, PeerMemory) else None
        if started is not None:
            return started
        if self._is_cuda and self._is_for_nccl(tensor.nbytes):
            return _NcclSum(self._ranks.allreduce([tensor]))
        self.all_reduce(tensor)
        return None

    def all_reduce_norm(self, norm: ctypes.Structure) -> bool:
        """See `mii.ops.all_reduce.Group`."""
        return self._peers is not None and self._peers.all_reduce_norm(norm)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [size, *shape], in the order of the ranks."""
        tensor, gathered = tensor.contiguous(), tensor.new_empty((self.size, *tensor.shape))
        if self._peers is None or not self._peers.all_gather(gathered, tensor):
            self._ranks.allgather([list(gathered.unbind())], [tensor]).wait()
        return gathered

    def wait(self, event: torch.cuda.Event) -> None:
        """Until an event on the device.

        Raises:
            GenerationError: a rank has sent nothing for too long.
        """
        if self._peers is None:
            event.synchronize()
        else:
            self._peers.wait(event)

    def close(self) -> None:
        """Gives connections and memory back."""
        ranks, self._ranks = self._ranks, None
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close(self._store)
        if ranks is not None:
            ranks.shutdown()


class _NcclSum:
    """A sum on NCCL's stream."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()

    def norm(self, norm: ctypes.Structure) -> bool:
        self.wait()
        return False


def _gloo(store: Any, rank: int, size: int, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        options._devices = [gloo.create_device(interface=interface)]
    elif address:
        options._devices = [gloo.create_device(hostname=address)]
    else:
        options._devices = [gloo.create_default_device()]
    options._timeout = timedelta(seconds=STEP_SECONDS)
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
