"""Products on a GPU by cuBLASLt with the algorithm that proves fastest on this card, in place of the one it guesses.

torch takes cuBLASLt's first guess for a shape. Here the first product of a shape times the first few guesses on the
tensors at hand, with the caches cleared before each launch, and keeps the first unless another is clearly faster. That
happens in a step that runs launch by launch; a step that is being captured takes what has been chosen before. torch has
the library loaded; it is called through its C interface.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass

import torch

# Off until a card has shown what it gives; benchmarks/kernels_linear.py does that.
TUNED = os.environ.get("MII_TUNED_PRODUCTS", "0") not in ("", "0")
MOST_ROWS = 1024  # steps of more rows come in every size
CANDIDATES, ROUNDS, WORKSPACE = 8, 6, 32 << 20
CLEARED = 128 << 20  # bytes that are written between two launches, more than the L2 cache holds
GAIN = 0.97  # share of the first guess's time that another has to stay below

_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_FLOAT, _COMPUTE_FLOAT, _TRANSPOSE = 0, 68, 1
_TRANSPOSE_A, _MAX_WORKSPACE = 3, 1  # of the attributes of a product and of a search


class _Guess(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class TunedError(RuntimeError):
    """cuBLASLt refused a call."""


class _Library:
    """cuBLASLt with a handle and a workspace on one device."""

    def __init__(self, device: torch.device) -> None:
        major = (torch.version.cuda or "").partition(".")[0]
        self._dll = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.handle = c_void_p()
        self.call("Create", byref(self.handle))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)

    def call(self, name: str, *args: object) -> None:
        status = getattr(self._dll, f"cublasLt{name}")(*args)
        if status != 0:
            raise TunedError(f"cublasLt{name} returned {status}")

    def created(self, name: str, *args: object) -> c_void_p:
        """What one of the `...Create` functions makes; it lives as long as the process."""
        made = c_void_p()
        self.call(f"{name}Create", byref(made), *args)
        return made


@functools.cache
def _library(device: torch.device) -> _Library | None:
    try:
        return _Library(device)
    except (OSError, AttributeError, TunedError):
        return None


@dataclass(frozen=True, slots=True)
class _Shape:
    device: torch.device
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    x_stride: int
    out_stride: int


class _Product:
    """out = x @ weight^T for one shape: to cuBLASLt, whose matrices are stored by columns, out^T = weight x^T."""

    def __init__(self, library: _Library, shape: _Shape) -> None:
        kind = _TYPES[shape.dtype]
        self.library, self.best = library, _Guess()
        self.desc = library.created("MatmulDesc", _COMPUTE_FLOAT, _FLOAT)
        transpose = c_int32(_TRANSPOSE)
        library.call("MatmulDescSetAttribute", self.desc, _TRANSPOSE_A, byref(transpose), c_size_t(4))
        n, k, rows = c_uint64(shape.out_features), c_uint64(shape.in_features), c_uint64(shape.rows)
        self.weight = library.created("MatrixLayout", kind, k, n, c_int64(shape.in_features))
        self.x = library.created("MatrixLayout", kind, k, rows, c_int64(shape.x_stride))
        self.out = library.created("MatrixLayout", kind, n, rows, c_int64(shape.out_stride))

    def guesses(self) -> list[_Guess]:
        """cuBLASLt's own candidates, the likeliest first."""
        library, found, count = self.library, (_Guess * CANDIDATES)(), c_int()
        search = library.created("MatmulPreference")
        limit = c_size_t(WORKSPACE)
        library.call("MatmulPreferenceSetAttribute", search, _MAX_WORKSPACE, byref(limit), c_size_t(8))
        layouts = (self.weight, self.x, self.out, self.out)
        arguments = (library.handle, self.desc, *layouts, search, CANDIDATES, found, byref(count))
        library.call("MatmulAlgoGetHeuristic", *arguments)
        library.call("MatmulPreferenceDestroy", search)
        return [guess for guess in found[: count.value] if guess.status == 0]

    def launch(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, guess: _Guess) -> None:
        one, zero = c_float(1.0), c_float(0.0)
        left = (byref(one), c_void_p(weight.data_ptr()), self.weight, c_void_p(x.data_ptr()), self.x)
        into = (c_void_p(out.data_ptr()), self.out)
        memory = (c_void_p(self.library.workspace.data_ptr()), c_size_t(WORKSPACE))
        stream = c_void_p(torch.cuda.current_stream(out.device).cuda_stream)
        self.library.call(
            "Matmul", self.library.handle, self.desc, *left, byref(zero), *into, *into,
            byref(guess, _Guess.algorithm.offset), *memory, stream,
        )  # fmt: skip

    def choose(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Keeps the fastest candidate; what it leaves in `out` is the product."""
        guesses = self.guesses()
        if not guesses:
            raise TunedError("cublasLtMatmulAlgoGetHeuristic found no algorithm")
        seconds = self._seconds(out, x, weight, guesses)
        fastest = min(range(len(guesses)), key=seconds.__getitem__)
        self.best = guesses[fastest if seconds[fastest] < GAIN * seconds[0] else 0]

    def _seconds(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, guesses: list[_Guess]) -> list[float]:
        """Each candidate's least time over rounds in which all take turns."""
        other = torch.empty(CLEARED, dtype=torch.uint8, device=out.device)
        spans = [[self._span(out, x, weight, guess, other) for guess in guesses] for _ in range(ROUNDS)]
        torch.cuda.synchronize(out.device)
        times = [[begin.elapsed_time(end) for begin, end in turn] for turn in spans[1:]]
        return [min(column) for column in zip(*times, strict=True)]

    def _span(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, guess: _Guess, other: torch.Tensor
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()  # while it runs, the host gets ahead of the device
        begin.record()
        self.launch(out, x, weight, guess)
        end.record()
        return begin, end


_products: dict[_Shape, _Product | None] = {}


def linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """out = x @ weight^T as in `mii.ops.linear`, by the chosen algorithm. False: none chosen for these arguments."""
    if not TUNED or not x.is_cuda or not 0 < x.shape[0] <= MOST_ROWS or weight.dtype not in _TYPES:
        return False
    if any(t.stride(1) != 1 or t.data_ptr() % 256 for t in (out, x, weight)) or not weight.is_contiguous():
        return False  # candidates are found for addresses that are aligned as allocations are
    shape = _Shape(x.device, weight.dtype, x.shape[0], weight.shape[0], weight.shape[1], x.stride(0), out.stride(0))
    if shape not in _products and not torch.cuda.is_current_stream_capturing():
        _products[shape] = _chosen(shape, out, x, weight)
    product = _products.get(shape)
    if product is not None:
        product.launch(out, x, weight, product.best)
    return product is not None


def _chosen(shape: _Shape, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> _Product | None:
    library = _library(shape.device)
    if library is None:
        return None
    try:
        product = _Product(library, shape)
        product.choose(out, x, weight)
    except TunedError:
        return None
    return product
