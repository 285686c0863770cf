"""Matrix product with a weight that was packed once at load: out = x @ weight^T + bias.

On the CPU the weight is repacked into panels of 16 output features (csrc/cpu/isa/linear.cpp) that serve one row (a
stream through memory) and many (AMX tiles) alike, so there is one copy of it. On a GPU the weight stays as it is and
torch multiplies (cuBLASLt), or, for a few rows and where STREAMED_ROWS says so, a kernel that streams the weight
(csrc/include/mii/linear_stream.cuh). Where no native library serves, torch multiplies too.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from dataclasses import dataclass

import torch

from mii.ops import abi, native

# Up to this many rows (64 at most) a product on a GPU goes to the kernel that streams the weight. 0, cuBLASLt for all,
# until its speed on a card has been measured; benchmarks/kernels_linear.py does that.
STREAMED_ROWS = int(os.environ.get("MII_STREAMED_ROWS", "0"))


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


_huge_pages = _HugePages()


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
            data, packed = _huge_pages.empty(bytes_needed), True
            args.packed = data.data_ptr()
            library.call("mii_linear_pack", args)
    return LinearWeight(data, out_features, in_features, weight.dtype, packed)


def linear(out: torch.Tensor, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None = None) -> None:
    """out = x @ weight^T + bias, summed in float and rounded once.

    Args:
        out: [rows, out_features], rows may be strided; must not overlap x.
        x: [rows, in_features], rows may be strided; the weight's dtype.
        weight: from `pack_linear`.
        bias: [out_features] or None.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    rows = x.shape[0]
    if (
        x.shape != (rows, weight.in_features)
        or out.shape != (rows, weight.out_features)
        or x.dtype != weight.dtype
        or out.dtype != weight.dtype
    ):
        raise ValueError(
            f"linear: x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} must be [rows, "
            f"{weight.in_features}] and [rows, {weight.out_features}] of the weight's dtype {weight.dtype}"
        )
    if not weight.packed:
        if not (rows <= STREAMED_ROWS and x.is_cuda and _linear_streamed(out, x, weight, bias)):
            _linear_torch(out, x, weight.data, bias)
        return
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("linear: x and out must be contiguous along a row")
    args = abi.MiiLinear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data.data_ptr(),
        native.pointer(bias),
        rows,
        weight.in_features,
        weight.out_features,
        x.stride(0),
        out.stride(0),
        abi.DTYPE_CODES[weight.dtype],
    )
    library = native.library(x.device)
    if library is None or not library.call("mii_linear", args):
        linear_reference(out, x, weight, bias)


def _linear_streamed(out: torch.Tensor, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None) -> bool:
    """A few rows on a GPU by the kernel that streams the weight; False: it does not take these."""
    library = native.library(x.device)
    strided = x.stride(1) != 1 or out.stride(1) != 1 or not weight.data.is_contiguous()
    if library is None or strided or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
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
        _workspace(library, x.device).data_ptr(),
    )
    return library.call("mii_linear", args, native.stream(x.device))


_workspaces: dict[torch.device, torch.Tensor] = {}


def _workspace(library: native.Library, device: torch.device) -> torch.Tensor:
    """Partial sums and their counters, one for each device: the calls of an engine follow one another in a stream."""
    if device not in _workspaces:
        size = library.bytes("mii_linear_workspace_bytes", abi.MiiLinear())
        _workspaces[device] = torch.zeros(size, dtype=torch.uint8, device=device)
    return _workspaces[device]


def _linear_torch(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_reference(
    out: torch.Tensor, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None = None
) -> None:
    """`linear` in plain torch, in float, from the unpacked weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) @ weight.unpacked().to(wide).t()
    out.copy_(value if bias is None else value + bias.to(wide))
