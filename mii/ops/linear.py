"""Matrix product with a weight that was packed once at load: out = x @ weight^T + bias.

On the CPU the weight is repacked into panels of 16 output features (csrc/cpu/isa/linear.cpp) that serve one row (a
stream through memory) and many (AMX tiles) alike, so there is one copy of it. On a GPU the weight stays as it is and
torch multiplies (cuBLASLt, by an algorithm of its choice or, where it was found to be faster, of ours: mii/ops/
products.py), or, for a few rows, a kernel that streams the weight (mii/ops/linear_hopper.py). Where no native library
serves, torch multiplies.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mii.ops import abi, linear_hopper, native, products
from mii.ops.activation import activation
from mii.ops.summands import Summands


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight [out_features, in_features] in the layout that `linear` reads.

    Args:
        data: the row-major weight itself, or (packed) the bytes that mii_linear_pack wrote.
        out_features, in_features: the weight's logical shape.
        dtype: of the weight's elements; x, out and bias have it too.
        packed: whether `data` is in the native layout.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    packed: bool

    @property
    def device(self) -> torch.device:
        return self.data.device

    def unpacked(self) -> torch.Tensor:
        """The weight as a row-major [out_features, in_features] tensor (a copy where it is packed)."""
        if not self.packed:
            return self.data
        panels = -(-self.out_features // 16)
        values = self.data.view(self.dtype).view(panels, -1)
        if self.dtype == torch.bfloat16:
            rows = values.view(panels, -1, 16, 2).permute(0, 2, 1, 3)
        else:
            rows = values.view(panels, -1, 16).permute(0, 2, 1)
        return rows.reshape(panels * 16, -1)[: self.out_features, : self.in_features].contiguous()


class _HugePages:
    """Memory for packed weights on pages of 2 MiB, where the system gives them: a weight that is streamed once a token
    spends up to a fifth of its time on address translation otherwise. A chunk goes when its last weight does.
    """

    page, chunk = 2 << 20, 64 << 20

    def __init__(self) -> None:
        self._current: weakref.ref[mmap.mmap] | None = None
        self._used = 0
        self._lock = threading.Lock()

    def empty(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, aligned to a cache line."""
        with self._lock:
            current = self._current() if self._current is not None else None
            if current is None or self._used + num_bytes > len(current):
                current = self._map(max(num_bytes, self.chunk) + self.page)
            start, self._used = self._used, self._used + -(-num_bytes // 64) * 64
        return torch.frombuffer(current, dtype=torch.uint8, count=num_bytes, offset=start)

    def _map(self, num_bytes: int) -> mmap.mmap:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._current, self._used = weakref.ref(memory), -address % self.page
        return memory


huge_pages = _HugePages()


def pack_linear(weight: torch.Tensor) -> LinearWeight:
    """Prepares a weight for `linear`; the argument itself may be dropped afterwards.

    Args:
        weight: [out_features, in_features], contiguous along a row.

    Raises:
        ValueError: not a matrix, or not contiguous along a row.
    """
    if weight.dim() != 2 or weight.stride(1) != 1:
        raise ValueError(
            f"pack_linear: the weight must be [out_features, in_features] and contiguous along a row; it is "
            f"{tuple(weight.shape)} with strides {weight.stride()}"
        )
    out_features, in_features = weight.shape
    library = native.library(weight.device)
    code = abi.DTYPE_CODES.get(weight.dtype)
    data, packed = weight, False
    if code is not None and library is not None and library.has("mii_linear_pack") and weight.numel():
        args = abi.MiiLinearPack(None, weight.data_ptr(), in_features, out_features, weight.stride(0), code)
        bytes_needed = library.bytes("mii_linear_packed_bytes", args)
        if bytes_needed > 0:
            data, packed = huge_pages.empty(bytes_needed), True
            args.packed = data.data_ptr()
            library.call("mii_linear_pack", args)
    linear_hopper.prepare(weight.device)
    return LinearWeight(data, out_features, in_features, weight.dtype, packed)


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: LinearWeight,
    bias: torch.Tensor | None = None,
    *,
    following: LinearWeight | None = None,
    summands: torch.Tensor | None = None,
) -> torch.Tensor | Summands:
    """out = x @ weight^T + bias, summed in float and rounded once.

    Args:
        out: [rows, out_features], rows may be strided; must not overlap x.
        x: [rows, in_features], rows may be strided; the weight's dtype.
        weight: from `pack_linear`.
        bias: [out_features] or None.
        following: the weight of the next product, whose first part may come into the cache while this one ends.
        summands: float memory of any size; where the product is faster so, parts of it are left there and not in out.

    Returns:
        What holds the product: out, or its parts.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(out, x, weight, weight.out_features)
    if not weight.packed:
        if summands is not None and summands.numel():
            parts = linear_hopper.parts(summands, x, weight.data, bias, _data(following))
            if parts is not None:
                return Summands(parts, weight.dtype)
        if not linear_hopper.linear(out, x, weight.data, bias, _data(following)):
            _linear_torch(out, x, weight.data, bias)
        return out
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("linear: x and out must be contiguous along a row")
    args = abi.MiiLinear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data.data_ptr(),
        native.pointer(bias),
        x.shape[0],
        weight.in_features,
        weight.out_features,
        x.stride(0),
        out.stride(0),
        abi.DTYPE_CODES[weight.dtype],
    )
    library = native.library(x.device)
    if library is None or not library.call("mii_linear", args):
        linear_reference(out, x, weight, bias)
    return out


def gated_linear(
    out: torch.Tensor,
    scratch: torch.Tensor,
    x: torch.Tensor,
    weight: LinearWeight,
    kind: str,
    bias: torch.Tensor | None = None,
    *,
    following: LinearWeight | None = None,
) -> None:
    """out = act(x @ gate^T) * (x @ up^T), both products with their bias and rounded first; the weight is [gate | up].

    Args:
        out: [rows, out_features / 2]; scratch: [at most rows, out_features], for the two products where no kernel does
            all at once: then as many rows are done at a time as it has.
        x, weight, bias, following: as for `linear`.
        kind: one of `abi.ACTIVATIONS`.

    Raises:
        ValueError: an unknown kind, shapes or dtypes that do not fit together.
    """
    _check(out, x, weight, weight.out_features // 2)
    if not weight.packed and linear_hopper.linear(out, x, weight.data, bias, _data(following), kind):
        return
    for piece in pieces(x.shape[0], scratch.shape[0]):
        both = scratch[: piece.stop - piece.start]
        linear(both, x[piece], weight, bias, following=following)
        activation(out[piece], both, kind, gated=True)


# Rows of an MLP at a time on a GPU: gate and up of 8,192 rows of an 8B Llama take 2 % longer in four pieces than in one
# (H200), and all results of its MLP half a gigabyte less.
_ROWS_AT_ONCE = 2048


def rows_at_once(rows: int, device: torch.device) -> int:
    """In pieces of how many rows an MLP of up to `rows` rows is best computed; its inner results have as many."""
    return min(rows, _ROWS_AT_ONCE) if device.type == "cuda" else rows


def pieces(rows: int, most: int) -> Iterator[slice]:
    """`rows` rows in as few pieces of at most `most` as will do, all about as large.

    >>> list(pieces(10, 4))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    if rows:
        size = -(-rows // -(-rows // most))
        for first in range(0, rows, size):
            yield slice(first, min(rows, first + size))


def _check(out: torch.Tensor, x: torch.Tensor, weight: LinearWeight, width: int) -> None:
    rows = x.shape[0]
    if (
        x.shape != (rows, weight.in_features)
        or out.shape != (rows, width)
        or x.dtype != weight.dtype
        or out.dtype != weight.dtype
    ):
        raise ValueError(
            f"linear: x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} must be [rows, "
            f"{weight.in_features}] and [rows, {width}] of the weight's dtype {weight.dtype}"
        )


def _data(weight: LinearWeight | None) -> torch.Tensor | None:
    return None if weight is None else weight.data


def _linear_torch(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is not None:
        torch.addmm(bias, x, weight.t(), out=out)
    elif not products.product(out, x, weight):
        torch.mm(x, weight.t(), out=out)


def linear_reference(
    out: torch.Tensor, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None = None
) -> None:
    """`linear` in plain torch, in float, from the unpacked weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) @ weight.unpacked().to(wide).t()
    out.copy_(value if bias is None else value + bias.to(wide))
