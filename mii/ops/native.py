"""Loads libmii_cpu.so and libmii_cuda.so and binds their C functions (see `csrc/include/mii/abi.h`).

Both libraries export the same names, so an operation asks `library(device)` for its functions and calls them with a
struct. `None` from `library` means: no native body here, use the plain torch reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from mii.logging import logger
from mii.ops import abi

_FOLDER = Path(__file__).resolve().parent.parent / "_lib"
_reference_only = os.environ.get("MII_REFERENCE_OPS", "") not in ("", "0")


class Recorder(Protocol):
    """Is told of every call that succeeded (see `mii.ops.recording`)."""

    def add(self, library: Library, name: str, args: ctypes.Structure) -> None: ...

    def aside(self, work: Callable[[], object]) -> None: ...


class _Recorders(threading.local):
    """What listens to the calls of each thread."""

    current: Recorder | None = None


recorders = _Recorders()
fallbacks = 0  # how often a plain torch body has served because there was no kernel for the arguments
# Operations of every step. Their torch bodies are far slower, and may read the device's memory, so that a step with one
# of them cannot be captured. Others have kernels for special cases only, which are asked for and refused silently.
_WARNED_ABOUT = frozenset(
    f"mii_{name}"
    for name in (
        *("prepare", "embedding", "norm", "rope_kv", "attention", "activation", "sample"),
        *("moe_route", "moe_stream", "moe_up", "moe_down", "moe_combine"),
    )
)


class NativeError(RuntimeError):
    """A kernel refused its arguments or the device reported an error; the message is the library's own."""


class Library:
    """One loaded library: its functions as attributes without the `mii_` prefix, each checked for its return code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dll = ctypes.CDLL(str(path))
        self._dll.mii_last_error.restype = ctypes.c_char_p
        self._dll.mii_build_info.restype = ctypes.c_char_p
        self._dll.mii_struct_size.restype = ctypes.c_int64
        self._dll.mii_struct_size.argtypes = [ctypes.c_char_p]
        self.functions: dict[str, Any] = {}
        self._warned: set[str] = set()
        for name, struct in abi.FUNCTIONS.items():
            self._bind(name, struct)

    def _bind(self, name: str, struct: type[ctypes.Structure]) -> None:
        function = getattr(self._dll, name, None)
        if function is None:
            return
        size = self._dll.mii_struct_size(struct.__name__.encode())
        if size != ctypes.sizeof(struct):
            raise NativeError(
                f"{self.path} was built for another version of mii: {struct.__name__} has {size} bytes there and "
                f"{ctypes.sizeof(struct)} here. Build it again: pip install ."
            )
        if name.endswith("_bytes"):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int64
        else:
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int32
        self.functions[name] = function

    def build_info(self) -> str:
        return self._dll.mii_build_info().decode()

    def has(self, name: str) -> bool:
        return name in self.functions

    def address(self, name: str) -> int:
        """Where a function lies, for lists of calls that the library runs by itself."""
        return ctypes.cast(self.functions[name], ctypes.c_void_p).value or 0

    def bytes(self, name: str, args: ctypes.Structure) -> int:
        """The result of one of the `..._bytes` functions."""
        return int(self.functions[name](ctypes.addressof(args)))

    def _warn(self, name: str, args: ctypes.Structure) -> None:
        """Says once for each operation that torch serves in its place, and counts each time."""
        global fallbacks
        fallbacks += 1
        if name not in self._warned:
            self._warned.add(name)
            numbers = [field for field, kind, *_ in args._fields_ if kind is not ctypes.c_void_p]
            shape = ", ".join(f"{field} {getattr(args, field)}" for field in numbers)
            logger.warning("no kernel for %s with %s: plain torch serves, which is right but slow", name, shape)

    def call(self, name: str, args: ctypes.Structure, stream: int = 0) -> bool:
        """Runs an operation. False: this library has no kernel for these arguments (the caller uses the reference)."""
        code = self.functions[name](ctypes.addressof(args), stream)
        if code == abi.OK:
            if recorders.current is not None:
                recorders.current.add(self, name, args)
            return True
        if code == abi.UNSUPPORTED:
            if name in _WARNED_ABOUT:
                self._warn(name, args)
            return False
        raise NativeError(f"{name}: {self._dll.mii_last_error().decode()}")


@functools.cache
def _load(kind: str) -> Library | None:
    path = _FOLDER / f"libmii_{kind}.so"
    if not path.exists():
        return None
    _share_openmp()
    return Library(path)


def _share_openmp() -> None:
    """Makes torch's own OpenMP runtime visible to our CPU library, which asks it how many threads torch may use."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
    except OSError:
        return
    for path in sorted(paths, key=lambda p: "torch" not in p)[:1]:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def aside(work: Callable[[], object]) -> None:
    """Does something that is no call of a library, and in a step that is recorded does it again at every replay.

    Args:
        work: works on the same memory each time.
    """
    if recorders.current is None:
        work()
    else:
        recorders.current.aside(work)


def library(device: torch.device) -> Library | None:
    """The native library for a device, or None where the plain torch bodies must serve."""
    return None if _reference_only else _load(device.type)


def stream(device: torch.device) -> int:
    """The current CUDA stream as a number; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


@contextmanager
def reference_ops() -> Iterator[None]:
    """Within this block every operation runs its plain torch body: the oracle of the kernel tests."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
