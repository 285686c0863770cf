"""Sums of ranks that are processes of one host with CPUs, in pages that all of them have mapped (csrc/cpu/ranks.cpp).

The pages are an anonymous file of rank 0's, which the others find through /proc, so nothing is left of them when the
last process has ended, however it ends. `MII_PEER_REDUCE=0` leaves everything to gloo.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from typing import Any

import torch

from mii.logging import logger
from mii.ops import abi, native
from mii.parallel.meeting import DisagreementError, agree, meet

REFUSED = os.environ.get("MII_PEER_REDUCE", "") == "0"
STEP_SECONDS = 6.0
"""How long a rank waits for the others within a step before it takes them for dead."""
_HALF_BYTES = 256 << 10
"""Bytes that are added up at a time: they stay in a cache."""
_EACH_BYTES = 4096 + 2 * _HALF_BYTES


class SharedPages:
    """The pages of a group, as this rank sees them.

    Args:
        rank: which one this is.
        size: how many there are.
        pages: of all ranks.
        pids: of all ranks.
    """

    num_bytes = 0  # of a GPU

    def __init__(self, rank: int, size: int, pages: mmap.mmap, pids: list[int]) -> None:
        library = native.library(torch.device("cpu"))
        if library is None or not library.has("mii_all_reduce"):
            raise native.NativeError("there is no CPU library of mii")
        self.rank, self._library, self._pages = rank, library, pages
        self._processes = [_process(pid) for pid in pids]
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.memory = (ctypes.c_void_p * size)(*(start + each * _EACH_BYTES for each in range(size)))
        self._alive = (ctypes.c_int32 * size)(*self._processes)
        self._ranks = abi.MiiRanks(
            ctypes.addressof(self.memory), None, ctypes.addressof(self._alive), _EACH_BYTES, int(STEP_SECONDS * 1e9),
            rank, size, 0,
        )  # fmt: skip

    def all_reduce(self, x: torch.Tensor) -> bool:
        """Sums a contiguous tensor over the ranks, in place; False: not one of this dtype.

        Raises:
            NativeError: a rank has ended, or does not come.
        """
        dtype = abi.DTYPE_CODES.get(x.dtype)
        if dtype is None:
            return False
        return self._library.call("mii_all_reduce", abi.MiiAllReduce(self._ranks, x.data_ptr(), x.numel(), 1, dtype))

    def all_reduce_norm(self, norm: ctypes.Structure) -> bool:
        """The norm is a call of its own here."""
        return False

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> bool:
        """Every rank's x, which is contiguous, one after the other in out; False: not one of this size.

        Raises:
            NativeError: a rank has ended, or does not come.
        """
        num_bytes = x.numel() * x.element_size()
        if num_bytes % 4:
            return False
        args = abi.MiiAllGather(self._ranks, out.data_ptr(), x.data_ptr(), num_bytes // 4)
        return self._library.call("mii_all_gather", args)

    def wait(self, event: torch.cuda.Event) -> None:
        """There is none on a CPU."""
        event.synchronize()

    def close(self, store: Any) -> None:
        """Gives the pages back. Nothing may be called afterwards."""
        for process in self._processes:
            if process >= 0:
                os.close(process)
        self._processes = []
        with suppress(BufferError):  # somebody still looks at them; they go with the last look
            self._pages.close()


def open_pages(store: Any, rank: int, size: int, is_local: bool) -> SharedPages | None:
    """The pages of a group; None, on every rank, where it does not go. All ranks call this at the same time.

    Args:
        store: torch's key-value store, for this group alone.
        rank: which one this is.
        size: how many there are.
        is_local: all ranks are on one host.
    """
    if not is_local:
        return None
    file, made = -1, list[SharedPages]()
    try:
        if rank == 0:
            file = os.memfd_create("mii-ranks")
            os.ftruncate(file, size * _EACH_BYTES)
        places = meet(store, rank, size, "pages", f"{os.getpid()} {file}")
        pids = [int(place.split()[0]) for place in places]
        agree(store, rank, size, "mapped", lambda: made.append(_map(places[0], rank, size, pids)))
        return made[0]
    except DisagreementError as reason:
        for pages in made:
            pages.close(store)
        if rank == 0 and not REFUSED:
            logger.warning("gloo adds up what the ranks compute (%s)", reason)
        return None
    finally:
        if file >= 0:
            os.close(file)


def _map(place: str, rank: int, size: int, pids: list[int]) -> SharedPages:
    if REFUSED:
        raise native.NativeError("MII_PEER_REDUCE is 0")
    pid, number = place.split()
    file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return SharedPages(rank, size, mmap.mmap(file, size * _EACH_BYTES), pids)
    finally:
        os.close(file)


def _process(pid: int) -> int:
    """A descriptor by which one sees a process end; -1: there is none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
