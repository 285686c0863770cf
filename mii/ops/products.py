"""Products by cuBLASLt with the algorithm that is fastest for their shape on this GPU.

cuBLASLt proposes algorithms by a model of the card, and torch takes the first that it proposes. That is the fastest for
most shapes and up to a quarter slower for some, so an engine times them when it starts:

    choose(weights, rows)            # of one shape; before steps are captured
    product(out, x, weight)          # False: nothing was chosen for this shape, torch multiplies
    adopt(weight, rows, algorithm)   # what an earlier process chose, by `algorithm_of`
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mii.ops import abi, native

WORKSPACE_BYTES = 16 << 20
LEAST_GAIN = 1.02
"""How much faster than cuBLASLt's first choice another one must be found: what times differ by from run to run does not
decide."""
_ADDRESSES = 256  # bytes at which what cuBLASLt works on must begin, or its proposals would be others


class Times(NamedTuple):
    """Microseconds of a product by the algorithm that cuBLASLt proposes first, and by the one that was chosen."""

    first: float
    chosen: float


_Shape = tuple[torch.device, torch.dtype, int, int, int]
_chosen: dict[_Shape, ctypes.Array[ctypes.c_char]] = {}
_workspaces: dict[torch.device, torch.Tensor] = {}


def choose(weights: Sequence[torch.Tensor], rows: int, *, seconds: float = 1e-4) -> Times | None:
    """Finds the fastest algorithm for products of so many rows, and `product` uses it from now on if it gains by it.

    Args:
        weights: [out_features, in_features] each, contiguous and of one shape, dtype and GPU; timed in turn, so that
            none of them is in a cache if together they are larger than it.
        rows: of x.
        seconds: how long each of the best is repeated at a time. A card that is at its limit of power needs longer to
            show what it can keep up.

    Returns:
        The times; None where there is no choice: on a CPU, in float32.
    """
    weight = weights[0]
    library = native.library(weight.device)
    if library is None or not library.has("mii_product_choose") or weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    features, width = weight.shape
    x = torch.randn(rows, width, dtype=weight.dtype, device=weight.device)
    out = torch.empty(rows, features, dtype=weight.dtype, device=weight.device)
    algorithm, times = ctypes.create_string_buffer(abi.ALGORITHM_BYTES), (ctypes.c_float * 2)()
    addresses = (ctypes.c_void_p * len(weights))(*(each.data_ptr() for each in weights))
    args = abi.MiiProductChoice(
        _arguments(out, x, weight, algorithm), ctypes.addressof(addresses), len(weights), int(seconds * 1e9),
        ctypes.addressof(times),
    )  # fmt: skip
    if not library.call("mii_product_choose", args, native.stream(weight.device)):
        return None
    found = Times(*times)
    if found.first < LEAST_GAIN * found.chosen:
        return Times(found.first, found.first)
    _chosen[_shape(weight, rows)] = algorithm
    return found


def name_of(weight: torch.Tensor, rows: int) -> str:
    """What a product is called where choices are kept."""
    features, width = weight.shape
    return f"{str(weight.dtype).removeprefix('torch.')} {features} x {width} by {rows}"


def algorithm_of(weight: torch.Tensor, rows: int) -> bytes:
    """The algorithm that `choose` has found, as bytes that are cuBLASLt's affair; none: its first."""
    algorithm = _chosen.get(_shape(weight, rows))
    return b"" if algorithm is None else algorithm.raw


def adopt(weight: torch.Tensor, rows: int, algorithm: bytes) -> None:
    """Takes what `algorithm_of` gave in a process with the same kind of GPU and the same libraries."""
    if algorithm:
        _chosen[_shape(weight, rows)] = ctypes.create_string_buffer(algorithm, abi.ALGORITHM_BYTES)


def product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """out = x @ weight^T by the algorithm that was chosen for it. False: nothing was done.

    Args:
        out: [rows, out_features]; x: [rows, in_features]; both contiguous along a row.
        weight: [out_features, in_features], contiguous.
    """
    algorithm = _chosen.get(_shape(weight, x.shape[0])) if _chosen else None
    if algorithm is None or x.stride(1) != 1 or out.stride(1) != 1 or not weight.is_contiguous():
        return False
    if (x.data_ptr() | out.data_ptr() | weight.data_ptr()) % _ADDRESSES:
        return False
    library = native.library(x.device)
    return library is not None and library.call(
        "mii_product", _arguments(out, x, weight, algorithm), native.stream(x.device)
    )


def _shape(weight: torch.Tensor, rows: int) -> _Shape:
    features, width = weight.shape
    return weight.device, weight.dtype, rows, width, features


def _arguments(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, algorithm: ctypes.Array[ctypes.c_char]
) -> ctypes.Structure:
    pointers = (out.data_ptr(), x.data_ptr(), weight.data_ptr(), None)
    sizes = (x.shape[0], weight.shape[1], weight.shape[0], x.stride(0), out.stride(0))
    linear = abi.MiiLinear(*pointers, *sizes, abi.DTYPE_CODES[x.dtype], _workspace(x.device).data_ptr())
    return abi.MiiProduct(linear, ctypes.addressof(algorithm), WORKSPACE_BYTES)


def _workspace(device: torch.device) -> torch.Tensor:
    """One for each device: the products of an engine follow one another."""
    if device not in _workspaces:
        _workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[device]
