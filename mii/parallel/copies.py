"""Sums over two GPUs whose numbers the copy engines carry: begun, left alone while something else is computed, and
added up when they are needed (csrc/include/mii/copied_sum.cuh). No multiprocessor works for them meanwhile.
"""

from __future__ import annotations

import ctypes

import torch

from mii.ops import abi, native

PLACES = 4
"""Of each rank's memory, which copies take in turns. They suffice where no more than `MOST_UNDER_WAY` sums are begun
and not yet taken: who begins sum n has taken sum n - 2, so the other rank had begun that one, and before it had taken
sum n - 4, which lay where n goes."""
MOST_UNDER_WAY = 2
PLACE_BYTES = 32 << 20
"""The largest sum."""
LEAST_BYTES = 8 << 20
"""Below, by reckoning, products lose more by the few rows of a half than sums take; from 8 and from 16 MiB on, measured
on two H200, makes no difference."""


class Copies:
    """One rank's end of the copies between two GPUs.

    Args:
        ranks: an `abi.MiiRanks` of two; places lie past its `bytes` in either memory.
        library: the CUDA library of mii.
        device: this rank's GPU.
    """

    def __init__(self, ranks: ctypes.Structure, library: native.Library, device: torch.device) -> None:
        self._ranks, self.library, self.device = ranks, library, device
        self._stream = torch.cuda.Stream(device)
        self._made = torch.cuda.Event()
        self._sent = [torch.cuda.Event() for _ in range(PLACES)]
        self._begun = self._taken = 0

    def takes(self, num_bytes: int) -> bool:
        """Whether a sum of so many bytes gains by being begun early."""
        return LEAST_BYTES <= num_bytes <= PLACE_BYTES

    def start(self, x: torch.Tensor) -> CopiedSum | None:
        """Begins to sum a contiguous tensor; None: not for this one, on both ranks. Sums are taken in the order in
        which they were begun, and x must not change before.
        """
        whole = x.nbytes % 16 == 0 and x.dtype in abi.DTYPE_CODES
        if not whole or x.nbytes > PLACE_BYTES or self._begun - self._taken >= MOST_UNDER_WAY:
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        turn = self._begun % PLACES
        place, dtype = self._ranks.bytes + turn * PLACE_BYTES, abi.DTYPE_CODES[x.dtype]
        args = abi.MiiCopiedSum(self._ranks, x.data_ptr(), place, x.numel(), self._begun + 1, dtype)
        self._made.record()
        self._stream.wait_event(self._made)
        if not self.library.call("mii_send_copy", args, self._stream.cuda_stream):
            return None
        self._sent[turn].record(self._stream)
        self._begun += 1
        return CopiedSum(self, args, self._sent[turn])

    def take(self, sent: torch.cuda.Event) -> None:
        """Whatever follows may write to what was copied."""
        self._taken += 1
        torch.cuda.current_stream(self.device).wait_event(sent)


class CopiedSum:
    """A sum that is under way; see `mii.ops.all_reduce.StartedSum`."""

    def __init__(self, copies: Copies, args: ctypes.Structure, sent: torch.cuda.Event) -> None:
        self._copies, self._args, self._sent = copies, args, sent

    def wait(self) -> None:
        self._copies.take(self._sent)
        self._call("mii_copied_sum", self._args)

    def norm(self, norm: ctypes.Structure) -> bool:
        args = self._args
        self._copies.take(self._sent)
        if self._call("mii_copied_sum_norm", abi.MiiCopiedSumNorm(args.ranks, norm, args.place, args.round)):
            return True
        self._call("mii_copied_sum", args)
        return False

    def _call(self, name: str, args: ctypes.Structure) -> bool:
        return self._copies.library.call(name, args, native.stream(self._copies.device))
