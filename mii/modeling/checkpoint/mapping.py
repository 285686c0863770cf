"""Files mapped into memory: tensors are views of the page cache, and only what is looked at is read from the disk."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii.errors import CheckpointError

if TYPE_CHECKING:
    import torch  # imported when the first tensor is made: whoever reads headers alone does without

# Without a reservation a file larger than the memory can be mapped privately. Python names this flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_READ_AHEAD_BYTES = 8 << 20
_LFS_POINTER = b"version https://git-lfs"

Range = tuple[int, int]


class MappedFile:
    """One file of weights.

    The mapping is private and writable, so an accidental write changes this process's copy of a page, never the file.
    It lives as long as any tensor that looks into it, even after `close`.

    Args:
        path: the file.

    Raises:
        CheckpointError: it cannot be opened, is empty, or is a Git LFS pointer instead of the file itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            self._buffer = self._map()
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        self.size = len(self._buffer)
        self._data: torch.Tensor | None = None

    def _map(self) -> mmap.mmap:
        size = os.fstat(self._fd).st_size
        if size == 0:
            raise CheckpointError(f"{self.path} is empty. Copy or download it again.")
        try:
            buffer = mmap.mmap(
                self._fd, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be mapped into memory: {error.strerror}.") from error
        if buffer[: len(_LFS_POINTER)] == _LFS_POINTER:
            raise CheckpointError(f"{self.path} is a Git LFS pointer, not the file itself. Run `git lfs pull` there.")
        return buffer

    @property
    def buffer(self) -> mmap.mmap:
        """The bytes of the file, for parsing headers."""
        return self._buffer

    @property
    def data(self) -> torch.Tensor:
        """[bytes of the file] uint8; empty once it is closed."""
        if self._data is None:
            import torch

            self._data = torch.frombuffer(self._buffer, dtype=torch.uint8)
        return self._data if self._fd >= 0 else self._data.new_empty(0)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of the file from byte `offset` on; a copy only where the offset is no multiple of the item size."""
        count = 1
        for size in shape:
            count *= size
        raw = self.data[offset : offset + count * dtype.itemsize]
        if offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from byte `offset` on, by reading and not through the map; threads can do so at once.

        Raises:
            CheckpointError: the file ends before the buffer does, is closed, or cannot be read.
        """
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if not count:
                    raise CheckpointError(f"{self.path} became shorter while it was read. Copy or download it again.")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error

    def read_ahead(self, ranges: Iterable[Range]) -> None:
        """Asks the system to fetch byte ranges (start, end) in the background. A hint: it never fails."""
        if self._fd < 0 or not hasattr(os, "posix_fadvise"):
            return
        # A file descriptor of its own: `close` may come before the thread is done.
        arguments = (os.dup(self._fd), _merge(ranges))
        threading.Thread(target=_advise, args=arguments, name="mii-read-ahead", daemon=True).start()

    def close(self) -> None:
        """Lets go of the file. Tensors that were taken from it stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class FileRange:
    """Where a tensor lies: bytes `start` to `end` of its file."""

    file: MappedFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _merge(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1] + mmap.PAGESIZE:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _advise(descriptor: int, ranges: list[Range]) -> None:
    try:
        for start, end in ranges:
            for position in range(start, end, _READ_AHEAD_BYTES):
                length = min(_READ_AHEAD_BYTES, end - position)
                os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass  # some file systems take no advice
    finally:
        os.close(descriptor)


def rows_within(extent: Range, rows: int, index: tuple[slice, ...] | None) -> Range:
    """The bytes of those rows of a tensor (bytes `extent` of its file) that the first of some slices names."""
    start, end = extent
    if not index or not rows:
        return extent
    first, last, _ = index[0].indices(rows)
    size = (end - start) // rows
    return start + first * size, start + max(first, last) * size


def converted(tensor: torch.Tensor, dtype: torch.dtype | None, index: tuple[slice, ...] | None) -> torch.Tensor:
    """The part of a tensor that `index` names, in another dtype if one is given; a view where both allow it."""
    if index is not None:
        tensor = tensor[index]
    return tensor if dtype is None else tensor.to(dtype)


def describe(value: Any, limit: int = 60) -> str:
    """A value from a broken file, cut short for an error message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
