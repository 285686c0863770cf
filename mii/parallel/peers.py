"""Sums over the GPUs of one host without a library: each rank writes into memory of the others (csrc/include/mii/
peers.cuh), and where a norm follows it is part of the same kernel.

Two GPUs do so unless `MII_PEER_REDUCE=0`, more of them with `MII_PEER_REDUCE=1`, on every rank or none. It takes up to
8 ranks on one host whose GPUs see each other's memory. Where that is not so, and for what is too large, NCCL serves.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from mii.errors import GenerationError
from mii.logging import logger
from mii.ops import abi, native
from mii.ops.all_reduce import StartedSum
from mii.parallel.copies import PLACE_BYTES, PLACES, Copies
from mii.parallel.meeting import DisagreementError, agree

# Whether it is asked for (True), refused (False), or left to MEASURED: the numbers of GPUs on which it was measured.
ASKED_FOR = {"": None, "0": False}.get(os.environ.get("MII_PEER_REDUCE", ""), True)
MEASURED = (2,)
PATIENCE_SECONDS = 8.0
"""How long a GPU waits for another one's numbers before it takes that rank for dead: a replica with a rank that hangs
has 10 seconds to end."""
MOST_RANKS = 8
MOST_BYTES = 64 << 20
"""The largest sum; NCCL does those above. Measured up to here alone, where NCCL is still the slower one. Memory is four
times as much."""
MOST_GATHERED_BYTES = 4 << 20
# Up to so many bytes each rank sends everything to all others; above, two shots send less and wait twice. By the ranks.
_ONE_SHOT = {2: MOST_BYTES, 3: 256 << 10, 4: 128 << 10}
_ONE_SHOT_OF_MORE = 64 << 10
_FAREWELL = timedelta(seconds=5)


class PeerMemory:
    """This rank's memory for the others, and theirs.

    Args:
        rank: which one this is.
        size: how many there are.
        device: this rank's GPU.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        library = native.library(device)
        if library is None or not library.has("mii_peer_memory"):
            raise native.NativeError("there is no CUDA library of mii")
        self.rank, self.size, self.device, self._library = rank, size, device, library
        self._memory = (ctypes.c_void_p * size)()
        self._handle = (ctypes.c_char * 64)()
        self._lost = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        at_once = _memory_bytes(library, size)
        self.num_bytes = at_once + (PLACES * PLACE_BYTES if size == 2 else 0)
        places, lost, patience = ctypes.addressof(self._memory), self._lost.data_ptr(), int(PATIENCE_SECONDS * 1e9)
        self.ranks = abi.MiiRanks(places, lost, None, at_once, patience, rank, size, 0)
        self.copies = Copies(self.ranks, library, device) if size == 2 else None
        """What carries large sums while something else is computed, of two GPUs; None: nothing does."""
        self._act(abi.PEER_ALLOCATE, rank)

    @property
    def handle(self) -> str:
        """By which other processes find this rank's memory."""
        return bytes(self._handle).hex()

    def open(self, handles: list[str]) -> None:
        """Makes the other ranks' memories visible here.

        Raises:
            NativeError: the driver refuses.
        """
        for other, handle in enumerate(handles):
            if other != self.rank:
                ctypes.memmove(self._handle, bytes.fromhex(handle), 64)
                self._act(abi.PEER_OPEN, other)

    def try_out(self) -> None:
        """Adds up small numbers, whose sums are exact.

        Raises:
            NativeError: they do not come, or come wrong.
        """
        numbers = torch.arange(4096, dtype=torch.float32, device=self.device)
        for shots in (1, 2):
            x = numbers * (self.rank + 1)
            self.all_reduce(x, shots)
            right = torch.equal(x, numbers * (self.size * (self.size + 1) // 2))
            self.check_lost()
            if not right:
                raise native.NativeError("sums in the GPUs' memory come out wrong")

    def try_copies(self) -> None:
        """Adds up small numbers whose sums are begun before they are needed.

        Raises:
            NativeError: they do not come, or come wrong.
        """
        assert self.copies is not None
        numbers = torch.arange(4096, dtype=torch.float32, device=self.device)
        for _ in range(2 * PLACES):
            x = numbers * (self.rank + 1)
            started = self.copies.start(x)
            if started is None:
                raise native.NativeError("the driver has no words in the order of a stream")
            started.wait()
            right = torch.equal(x, numbers * 3)
            self.check_lost()
            if not right:
                raise native.NativeError("sums of copied numbers come out wrong")

    def check_lost(self) -> None:
        """Does nothing while every rank has come.

        Raises:
            NativeError: one was given up, so no sum is right any more.
        """
        if lost := self.lost():
            raise native.NativeError(f"nothing has come from rank {lost - 1} for {PATIENCE_SECONDS:g} seconds")

    def start(self, x: torch.Tensor) -> StartedSum | None:
        """Begins to sum a contiguous tensor over two GPUs; None: not for this one, on any rank."""
        return None if self.copies is None else self.copies.start(x)

    def takes(self, num_bytes: int) -> bool:
        """Whether a sum of so many bytes is not left to NCCL."""
        return num_bytes <= MOST_BYTES

    def all_reduce(self, x: torch.Tensor, shots: int | None = None) -> bool:
        """Sums a contiguous tensor over the ranks, in place; False: not for this one, on any rank."""
        num_bytes, dtype = x.numel() * x.element_size(), abi.DTYPE_CODES.get(x.dtype)
        if not self.takes(num_bytes) or dtype is None:
            return False
        args = abi.MiiAllReduce(self.ranks, x.data_ptr(), x.numel(), shots or self._shots(num_bytes), dtype)
        return self._library.call("mii_all_reduce", args, native.stream(self.device))

    def all_reduce_norm(self, norm: ctypes.Structure, shots: int | None = None) -> bool:
        """Sums and norms (see `mii.ops.all_reduce.all_reduce_norm`); False: not for this one, on any rank."""
        num_bytes = norm.rows * norm.width * (4 if norm.dtype == abi.DTYPE_CODES[torch.float32] else 2)
        if not self.takes(num_bytes):
            return False
        args = abi.MiiAllReduceNorm(self.ranks, norm, shots or self._shots(num_bytes))
        return self._library.call("mii_all_reduce_norm", args, native.stream(self.device))

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> bool:
        """Every rank's x, which is contiguous, one after the other in out; False: not for this one, on any rank."""
        num_bytes = x.numel() * x.element_size()
        if num_bytes * self.size > MOST_GATHERED_BYTES or num_bytes % 4:
            return False
        args = abi.MiiAllGather(self.ranks, out.data_ptr(), x.data_ptr(), num_bytes // 4)
        return self._library.call("mii_all_gather", args, native.stream(self.device))

    def lost(self) -> int:
        """1 + a rank that has not come; 0: none."""
        return int(self._lost.item())

    def wait(self, event: torch.cuda.Event) -> None:
        """Until an event on the device.

        Raises:
            GenerationError: a rank has not come in time.
        """
        try:
            self._library.call("mii_event_wait", abi.MiiEventWait(event.cuda_event, self._lost.data_ptr()))
        except native.NativeError as error:
            if lost := self.lost():
                raise GenerationError(
                    f"rank {lost - 1} of {self.size} has sent nothing to rank {self.rank}'s GPU for "
                    f"{PATIENCE_SECONDS:g} seconds: it is dead or hangs"
                ) from error
            raise

    def close(self, store: Any) -> None:
        """Gives the memory back, once all ranks have closed it. A rank that is gone leaves it to the process's end."""
        for other in range(self.size):
            if other != self.rank and self._memory[other]:
                with suppress(native.NativeError):  # of a process that has died
                    self._act(abi.PEER_CLOSE, other)
                self._memory[other] = None
        with suppress(Exception):  # the store may be gone with the rank that had it
            store.set(f"closed-{self.rank}", "")
            store.wait([f"closed-{other}" for other in range(self.size)], _FAREWELL)
            self._act(abi.PEER_FREE, self.rank)
            self._memory[self.rank] = None

    def _shots(self, num_bytes: int) -> int:
        return 1 if num_bytes <= _ONE_SHOT.get(self.size, _ONE_SHOT_OF_MORE) else 2

    def _act(self, action: int, rank: int) -> None:
        place = ctypes.addressof(self._memory) + rank * ctypes.sizeof(ctypes.c_void_p)
        handle, index = ctypes.addressof(self._handle), self.device.index or 0
        self._library.call("mii_peer_memory", abi.MiiPeerMemory(place, handle, self.num_bytes, index, action))


def _memory_bytes(library: native.Library, size: int) -> int:
    """What the largest sum takes."""
    ranks = abi.MiiRanks(size=size)
    sizes = []
    for shots, most in ((1, _ONE_SHOT.get(size, _ONE_SHOT_OF_MORE)), (2, MOST_BYTES)):
        dtype = abi.DTYPE_CODES[torch.float32]
        sizes.append(library.bytes("mii_all_reduce_bytes", abi.MiiAllReduce(ranks, None, most // 4, shots, dtype)))
    return max(sizes)


def open_peers(store: Any, rank: int, size: int, device: torch.device, is_local: bool) -> PeerMemory | None:
    """The memory of a group; None, on every rank, where it does not go. All ranks call this at the same time.

    Args:
        store: torch's key-value store, for this group alone.
        rank: which one this is.
        size: how many there are.
        device: this rank's GPU.
        is_local: all ranks are on one host.
    """
    made: list[PeerMemory] = []
    try:
        if not is_local or size > MOST_RANKS:
            raise DisagreementError(f"{size} ranks" + ("" if is_local else " on several hosts"))
        handles = agree(store, rank, size, "memory", lambda: _offer(made, rank, size, device))
        (peers,) = made
        agree(store, rank, size, "opened", lambda: peers.open(handles))
        agree(store, rank, size, "tried", peers.try_out)
        _try_copies(store, peers)
    except DisagreementError as reason:
        for peers in made:
            peers.close(store)
        if ASKED_FOR and rank == 0:
            logger.warning("MII_PEER_REDUCE: NCCL adds up what the ranks compute (%s)", reason)
        return None
    if rank == 0:
        logger.info("%d GPUs add up in each other's memory, %.0f MiB on each", size, peers.num_bytes / (1 << 20))
    return peers


def _try_copies(store: Any, peers: PeerMemory) -> None:
    """Finds out whether copies go, and does without them where they do not.

    Raises:
        DisagreementError: nothing can be summed in this memory any more.
    """
    if peers.copies is None:
        return
    try:
        agree(store, peers.rank, peers.size, "copied", peers.try_copies)
    except DisagreementError as reason:
        agree(store, peers.rank, peers.size, "all there", peers.check_lost)
        peers.copies = None
        if peers.rank == 0:
            logger.warning("GPUs add up large steps' numbers while nothing else is computed (%s)", reason)


def _offer(made: list[PeerMemory], rank: int, size: int, device: torch.device) -> str:
    if not (size in MEASURED if ASKED_FOR is None else ASKED_FOR):
        raise native.NativeError(f"{size} GPUs; MII_PEER_REDUCE=1 asks for it")
    made.append(PeerMemory(rank, size, device))
    return made[0].handle
