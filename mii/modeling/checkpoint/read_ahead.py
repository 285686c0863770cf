"""Reads a checkpoint's tensors for a GPU with several threads, ahead of whoever takes them, in the announced order.

A copy from a memory map to a GPU reads a page at a time and waits for each. Here threads read whole megabytes into
page-locked buffers, so a disk's queue is full and the page cache is copied as fast as memory goes; the copies to the
device start from there and wait for nobody, and a tensor is converted and arranged on the device. (On a CPU a copy from
the map is the faster way: no second one follows it, and all of torch's threads share it.)

    with open_checkpoint(path) as checkpoint, ReadAhead(checkpoint, device) as ahead:
        ahead.prefetch(names)
        for name in names:
            tensor = ahead.get(name)      # on the device
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mii.modeling.checkpoint.base import Checkpoint, Closing
from mii.modeling.checkpoint.mapping import FileRange, converted

_CHUNK = 16 << 20  # bytes that a thread reads at once
_MOST_THREADS = 8


def reads_ahead(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether `ReadAhead` is to be used: for a GPU, and tensors that lie in files as they are."""
    return device.type == "cuda" and hasattr(checkpoint, "location")


class Waitable(Protocol):
    """An event of the device, which tells that the copies before it are through."""

    def synchronize(self) -> None: ...


@dataclass(slots=True)
class _Chunk:
    """Bytes `start` to `end` of a tensor, and the buffer that they are read into."""

    where: FileRange
    start: int
    end: int
    buffer: torch.Tensor | None = None
    ready: bool = False


@dataclass(slots=True)
class _Pending:
    """A tensor that is read, in chunks."""

    name: str
    where: FileRange
    chunks: list[_Chunk] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.where.end - self.where.start


class ReadAhead(Closing):
    """A checkpoint whose tensors come from threads that read ahead. See `mii.modeling.checkpoint.Checkpoint`.

    Args:
        checkpoint: It has `location`.
        device: Where `get` leaves tensors that were announced by `prefetch` and are taken in that order. Others it
            leaves on the CPU.
        threads: None: one a core, up to 8. Each has two buffers.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, threads: int | None = None) -> None:
        self.path, self.kind = checkpoint.path, checkpoint.kind
        self.config, self.generation_config = checkpoint.config, checkpoint.generation_config
        self._checkpoint, self._device = checkpoint, device
        self._count = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._pending: deque[_Pending] = deque()
        self._todo: deque[_Chunk] = deque()
        self._buffers: deque[tuple[torch.Tensor, Waitable]] = deque()
        self._last: tuple[str, torch.Tensor] | None = None
        self._error: BaseException | None = None
        self._stopped = False

    def names(self) -> list[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def stored_bytes(self, name: str) -> int:
        return self._checkpoint.stored_bytes(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Starts to read these tensors, in this order."""
        for name in names:
            where: FileRange = self._checkpoint.location(name)  # type: ignore[attr-defined]
            pending = _Pending(name, where)
            for start in range(0, pending.size, _CHUNK):
                pending.chunks.append(_Chunk(where, start, min(start + _CHUNK, pending.size)))
            self._pending.append(pending)
            self._todo.extend(pending.chunks)
        for _ in range(min(2 * self._count, len(self._todo))):
            self._buffers.append((self._buffer(), self._event()))
        for _ in range(self._count):
            thread = threading.Thread(target=self._work, name="mii-read-ahead", daemon=True)
            thread.start()
            self._threads.append(thread)

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        if self._last is not None and self._last[0] == name:
            return converted(self._last[1], dtype, index)
        if self._stopped or not self._pending or self._pending[0].name != name:
            self._stop()  # the order is another one: no thread can know what comes next
            return self._checkpoint.get(name, dtype, index)
        pending = self._pending.popleft()
        tensor = self._copied(pending).view(pending.where.dtype).view(pending.where.shape)
        self._last = (name, tensor)
        return converted(tensor, dtype, index)

    def close(self) -> None:
        """Ends the threads and lets go of the files."""
        self._stop()
        self._checkpoint.close()

    def __enter__(self) -> ReadAhead:
        return self

    # -- who takes ----------------------------------------------------------------------------------------------------

    def _buffer(self) -> torch.Tensor:
        return torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)

    def _event(self) -> Waitable:
        """Of all that the device has been told until now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _copied(self, pending: _Pending) -> torch.Tensor:
        """All bytes of a tensor on the device, once the copies that were started are through."""
        data = torch.empty(pending.size, dtype=torch.uint8, device=self._device)
        for chunk in pending.chunks:
            with self._changed:
                self._changed.wait_for(lambda chunk=chunk: chunk.ready or self._error)  # type: ignore[misc]
                if self._error is not None:
                    raise self._error
                buffer, chunk.buffer = chunk.buffer, None
            assert buffer is not None
            data[chunk.start : chunk.end].copy_(buffer[: chunk.end - chunk.start], non_blocking=True)
            with self._changed:
                self._buffers.append((buffer, self._event()))
                self._changed.notify_all()
        return data

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._buffers.clear()
        self._pending.clear()
        self._last = None

    # -- who reads ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                assert chunk.buffer is not None
                array: Any = chunk.buffer.numpy()
                chunk.where.file.read_into(
                    memoryview(array)[: chunk.end - chunk.start], chunk.where.start + chunk.start
                )
                with self._changed:
                    chunk.ready = True
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> _Chunk | None:
        """The next chunk, with a buffer that no copy reads any more; None when there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._error or not self._todo or self._buffers)
            if self._stopped or self._error or not self._todo:
                return None
            chunk = self._todo.popleft()
            chunk.buffer, copied = self._buffers.popleft()
        copied.synchronize()
        return chunk
