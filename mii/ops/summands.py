"""What is left as parts of a sum: the norm that follows, which reads it anyway, adds them up and rounds once.

A weight whose rows are few tiles is read by all multiprocessors of a GPU if each takes a piece of the sum over k
(csrc/include/mii/linear_wide.cuh). And a token's experts give a row each, which are to be added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Summands:
    """What an operation left in place of its result.

    Args:
        parts: [number of parts, rows, features], contiguous along a row; float32, or what their sum is rounded to.
        dtype: what their sum is rounded to.
    """

    parts: torch.Tensor
    dtype: torch.dtype

    def total(self) -> torch.Tensor:
        """The result, [rows, features]: the sum of the parts in their order, in float."""
        total = self.parts[0].to(torch.float32, copy=True)
        for part in self.parts[1:]:
            total += part
        return total.to(self.dtype)
