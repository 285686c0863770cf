"""How a step's inputs travel from the host to the device: one buffer, one asynchronous copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mii.ops import abi

_ALIGNMENT = 32  # int32 elements: every tensor starts on a cache line of its own


@dataclass(frozen=True, slots=True)
class HostStep:
    """Numpy views (int32) of the buffer that the host fills for one step; see `mii.ops.prepare` for their meaning."""

    counts: np.ndarray[Any, np.dtype[np.int32]]
    seq_slot: np.ndarray[Any, np.dtype[np.int32]]
    q_start: np.ndarray[Any, np.dtype[np.int32]]
    kv_len: np.ndarray[Any, np.dtype[np.int32]]
    sample_seq: np.ndarray[Any, np.dtype[np.int32]]
    rope_shift: np.ndarray[Any, np.dtype[np.int32]]
    table_updates: np.ndarray[Any, np.dtype[np.int32]]
    host_ids: np.ndarray[Any, np.dtype[np.int32]]


class StepLayout:
    """Where each input lies in the packed buffer. `host_ids` comes last, so a small bucket's copy stops early."""

    def __init__(self, max_seqs: int, max_tokens: int, max_updates: int, shifted: bool = False) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "counts": (abi.COUNTS,),
            "seq_slot": (max_seqs,),
            "q_start": (max_seqs + 1,),
            "kv_len": (max_seqs,),
            "sample_seq": (max_seqs,),
            "rope_shift": (max_seqs * shifted,),
            "table_updates": (max_updates, 3),
            "host_ids": (max_tokens,),
        }
        self.fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            self.fields[name] = (self.size, shape)
            self.size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT

    def views(self, flat: Any) -> dict[str, Any]:
        """The named parts of a flat tensor or array of `size` elements, sharing its memory."""
        return {
            name: flat[start : start + math.prod(shape)].reshape(shape) for name, (start, shape) in self.fields.items()
        }

    def used(self, tokens: int) -> int:
        """How many elements hold everything of a step of up to `tokens` tokens."""
        return self.fields["host_ids"][0] + tokens


class Staging:
    """The packed device tensor and what fills it.

    On a GPU there are two pinned host buffers: while the copy of one step waits in the stream, the host fills the
    other. On the CPU the device tensor is itself the host's buffer and there is nothing to copy; a step then has to be
    finished before the next one is filled in.
    """

    def __init__(self, layout: StepLayout, device: torch.device) -> None:
        self.layout = layout
        self.packed = torch.zeros(layout.size, dtype=torch.int32, device=device)
        self._pinned: list[torch.Tensor] = []
        if device.type == "cuda":
            self._pinned = [torch.zeros(layout.size, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._pinned]  # counts as done until it is first recorded
        self._hosts = [HostStep(**layout.views(buffer.numpy())) for buffer in self._pinned or [self.packed]]
        self._current = 0

    def host(self) -> HostStep:
        """The views to fill for the next step; waits, if it must, until the copy of two steps ago has left them."""
        if self._pinned:
            self._copied[self._current].synchronize()
        return self._hosts[self._current]

    def upload(self, tokens: int) -> None:
        """Queues the copy of what `host()` gave, for a step of up to `tokens` tokens, and turns to the other buffer."""
        if not self._pinned:
            return
        used = self.layout.used(tokens)
        self.packed[:used].copy_(self._pinned[self._current][:used], non_blocking=True)
        self._copied[self._current].record(torch.cuda.current_stream(self.packed.device))
        self._current ^= 1
