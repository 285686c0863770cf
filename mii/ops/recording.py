"""Steps as recorded lists of native calls: what a CUDA graph is on a GPU, for the CPU.

A decode step is some 300 calls into libmii_cpu.so, each of which costs several microseconds of Python: checks, structs,
ctypes. A step of the same shape makes the same calls on the same memory, so the structs are kept the second time and
handed to the library as one list from then on. What changes from step to step (tokens, lengths, block tables) lies in
memory that the calls read, as it does for a graph.

    steps = RecordedSteps()
    steps.run((tokens, sequences), body)      # `body` runs the step's operations

A body that does anything else with tensors but take views (a plain torch operation, a body of an operation in torch) is
not recorded and simply runs; what it does through `native.aside` is done again in its place among the calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mii.ops import abi, native

# Questions about a tensor, and views of it: all that a recorded body may do with tensors besides native calls.
_METADATA = frozenset({"__get__", "__len__", "data_ptr", "dim", "is_contiguous", "numel", "size", "stride"})
_VIEWS = frozenset({"__getitem__", "flatten", "narrow", "reshape", "t", "transpose", "unflatten", "unsqueeze", "view"})


class _WatchTorch(TorchFunctionMode):
    """Notices torch operations that compute, allocate or write.

    Not `TorchDispatchMode`, which would be closer to the operators: its first use imports a second's worth of compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed = self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        name = getattr(func, "__name__", "")
        if name in _VIEWS:
            self.computed |= not _shares_memory(result, args[0])
        elif name not in _METADATA:
            self.computed = True
        return result


def _shares_memory(view: torch.Tensor, base: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


class Recording:
    """The native calls of one run of a body, in order, with copies of their structs, and what is done between them."""

    def __init__(self, watch: _WatchTorch) -> None:
        self._watch = watch
        self._library: native.Library | None = None
        self._structs: list[ctypes.Structure] = []
        self._calls: list[ctypes.Structure] = []
        self._arrays: list[ctypes.Array[Any]] = []
        self._parts: list[Callable[[], object]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, library: native.Library, name: str, args: ctypes.Structure) -> None:
        """Called by the library for each call of this thread that succeeded."""
        copy = type(args).from_buffer_copy(args)
        self._library = library
        self._structs.append(copy)
        self._calls.append(abi.MiiCall(library.address(name), ctypes.addressof(copy)))
        self._count += 1

    def aside(self, work: Callable[[], object]) -> None:
        """See `native.aside`. Native calls of the work are its own affair."""
        self._watch.paused = True
        native.recorders.current, before = None, native.recorders.current
        try:
            work()
        finally:
            self._watch.paused = False
            native.recorders.current = before
        self.finish()
        self._parts.append(work)

    def finish(self) -> None:
        """The calls since the last time become one."""
        if self._calls and self._library is not None:
            array = (abi.MiiCall * len(self._calls))(*self._calls)
            self._arrays.append(array)
            run = abi.MiiRun(ctypes.addressof(array), len(self._calls))
            self._parts.append(partial(self._library.call, "mii_run", run))
            self._calls = []

    def replay(self) -> None:
        """Makes the calls again.

        Raises:
            native.NativeError: one of them failed.
        """
        for part in self._parts:
            part()


def record(body: Callable[[], None]) -> Recording | None:
    """Runs a body and returns its native calls; None where it did something with tensors that is not one of them."""
    watch = _WatchTorch()
    recording = Recording(watch)
    native.recorders.current, before = recording, native.recorders.current
    try:
        with watch:
            body()
    finally:
        native.recorders.current = before
    if watch.computed or not len(recording):
        return None
    recording.finish()
    return recording


class RecordedSteps:
    """The recordings of one engine, by whatever tells steps of different structs apart.

    A key runs plainly the first time, is recorded the second time, and replayed from then on.

    Args:
        most: How many recordings are kept (about 50 KiB each); the oldest goes first.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._steps: dict[Hashable, Recording | None] = {}
        self._plain: set[Hashable] = set()

    def __len__(self) -> int:
        return sum(step is not None for step in self._steps.values())

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Runs a step; `body` makes the same calls on the same memory whenever the key is the same."""
        step = self._steps.get(key)
        if step is not None:
            step.replay()
        elif key in self._plain:
            body()
        elif key not in self._steps:
            body()
            self._keep(key, None)
        else:
            self._record(key, body)

    def _record(self, key: Hashable, body: Callable[[], None]) -> None:
        recording = record(body)
        if recording is None:
            self._plain.add(key)
        else:
            self._keep(key, recording)

    def _keep(self, key: Hashable, step: Recording | None) -> None:
        while len(self._steps) >= self._most and key not in self._steps:
            del self._steps[next(iter(self._steps))]
        self._steps[key] = step
