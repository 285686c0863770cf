"""The stacked weights of a mixture of experts, as the products of `mii.ops.moe` read them.

On the CPU every expert's weight is packed into the panels of `mii.ops.linear` (csrc/cpu/isa/moe.cpp). On a GPU the
weights stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.ops import abi, native
from mii.ops.linear import huge_pages


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The stacked weights of one product, in the layout that `moe_up` (gated) or `moe_down` reads.

    Args:
        data: The row-major weights [experts, rows, in_features], or (packed) the bytes that mii_moe_pack wrote.
        experts, out_features, in_features: Sizes; a gated weight has 2 * out_features rows, gate before up.
        dtype: Of the weights' elements.
        gated: Whether it holds gate and up.
        packed: Whether `data` is in the native layout.
    """

    data: torch.Tensor
    experts: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    gated: bool
    packed: bool

    def expert(self, index: int) -> torch.Tensor:
        """One expert's weight as a row-major matrix (a copy where it is packed)."""
        if not self.packed:
            return self.data[index]
        panels = -(-self.out_features // 16) * (2 if self.gated else 1)
        values = self.data.view(self.dtype).view(self.experts, panels, -1)[index]
        if self.dtype == torch.bfloat16:
            rows = values.view(panels, -1, 16, 2).permute(0, 2, 1, 3).reshape(panels, 16, -1)
        else:
            rows = values.view(panels, -1, 16).permute(0, 2, 1)
        rows = rows[..., : self.in_features]
        halves = [rows[0::2], rows[1::2]] if self.gated else [rows]
        return torch.cat([half.reshape(-1, self.in_features)[: self.out_features] for half in halves])


def pack_experts(weight: torch.Tensor, *, gated: bool) -> ExpertWeights:
    """Prepares stacked weights for `moe_up` (gated) or `moe_down`.

    Args:
        weight: [experts, rows, in_features], contiguous; gated: the first half of the rows is gate, the second up.

    Raises:
        ValueError: not of three dimensions, not contiguous, or gated with an odd number of rows.
    """
    if weight.dim() != 3 or not weight.is_contiguous() or (gated and weight.shape[1] % 2):
        raise ValueError(
            f"pack_experts: the weight must be [experts, {'2 * ' if gated else ''}out_features, in_features] and "
            f"contiguous; it is {tuple(weight.shape)} with strides {weight.stride()}"
        )
    experts, rows, in_features = weight.shape
    out_features = rows // 2 if gated else rows
    library, code = native.library(weight.device), abi.DTYPE_CODES.get(weight.dtype)
    data, packed = weight, False
    if library is not None and code is not None and library.has("mii_moe_pack") and weight.numel():
        args = abi.MiiMoePack(None, None, in_features, out_features, in_features, gated, code)
        size = library.bytes("mii_moe_packed_bytes", args)
        data, packed = huge_pages.empty(experts * size), True
        for index in range(experts):
            args.packed, args.weight = data.data_ptr() + index * size, weight[index].data_ptr()
            library.call("mii_moe_pack", args)
    return ExpertWeights(data, experts, out_features, in_features, weight.dtype, gated, packed)
