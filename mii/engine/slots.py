"""What a step has to know of the sequences that hold slots: columns with a row for each slot.

Hundreds of sequences do no more in a step than get one token longer, so they are counted together, in a few vector
operations, and Python looks at single ones only where something happens to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Column = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Slots:
    """Which slots are free, and the columns of those that are not.

    Attributes:
        length: int32, tokens that exist of a sequence that decodes; what it began with of any other.
        event: int32, the length at which it can not just feed its last token and get the next one: it needs a block, it
            is complete, or it is to be computed anew. 0 of a sequence that does not decode.
        comment: int32, from so many tokens on there may be more to say of one than its id.
        may_end: int32, no end of text counts before it has so many tokens.
        ticket: int64, another number each time that the slot is given away; 0 while it is free.
        held: Slots whose `may_end` may lie ahead.
    """

    def __init__(self, count: int) -> None:
        self.length, self.event, self.comment, self.may_end = (np.zeros(count, np.int32) for _ in range(4))
        self.ticket = np.zeros(count, np.int64)
        self.held: set[int] = set()
        self._free = list(range(count - 1, -1, -1))
        self._tickets = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> tuple[int, int]:
        """A free slot and its ticket; what its columns hold is of the one before."""
        slot = self._free.pop()
        self._tickets += 1
        self.ticket[slot] = self._tickets
        return slot, self._tickets

    def give_back(self, slot: int) -> None:
        self.ticket[slot] = 0
        self.held.discard(slot)
        self._free.append(slot)
