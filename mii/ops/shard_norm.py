"""A norm over features of which each rank has some: RMSNorm of a whole row, its squares summed over the ranks.

out = round(x * rsqrt(sum of squares of all ranks / whole + eps)) * weight, see `mii.ops.norm`.
"""

from __future__ import annotations

import torch

from mii.ops import abi
from mii.ops.all_reduce import Group


def norm_shards(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    kind: int,
    whole: int,
    counts: bool,
    group: Group,
) -> None:
    """Norms each row in place.

    Args:
        x: [rows, features of this rank], rows may be strided.
        weight: [features of this rank] or None (ones).
        eps: added to the mean square.
        kind: abi.RMS or abi.RMS_PLUS1.
        whole: features of all ranks together.
        counts: whether this rank's squares belong into the sum; False where another rank has the same features.
        group: the ranks.

    Raises:
        ValueError: it is a LayerNorm.
    """
    if kind == abi.LAYER:
        raise ValueError("norm_shards: a LayerNorm over the features of several ranks has no body; use one rank")
    values = x.float()
    mine = values.square().sum(1, dtype=torch.float64) * counts
    scale = torch.rsqrt(group.all_gather(mine).sum(0) / whole + eps).float().unsqueeze(1)
    normed = values * scale
    if kind == abi.RMS:
        x.copy_(normed)
        if weight is not None:
            x.mul_(weight)
        return
    x.copy_(normed if weight is None else normed * (1 + weight.float()))
