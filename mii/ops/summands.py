"""A product that is left as parts of its sum: what follows adds them up, and rounds once.

A weight whose rows are few tiles is read by all multiprocessors of a GPU if each takes a piece of the sum over k
(csrc/include/mii/linear_wide.cuh). Its parts are then added up by the norm that reads the product anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Summands:
    """What `mii.ops.linear.linear` left in place of a product.

    Args:
        parts: [number of parts, rows, features], float, contiguous.
        dtype: what their sum is rounded to.
    """

    parts: torch.Tensor
    dtype: torch.dtype

    def total(self) -> torch.Tensor:
        """The product, [rows, features]: the sum of the parts in their order."""
        total = self.parts[0].clone()
        for part in self.parts[1:]:
            total += part
        return total.to(self.dtype)
