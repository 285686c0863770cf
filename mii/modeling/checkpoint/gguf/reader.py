"""Reads the container of a GGUF file (versions 2 and 3, little-endian): metadata and where each tensor lies.

Layout: "GGUF", version u32, tensor count u64, key count u64; the keys (name, type u32, value); the tensors'
descriptions (name, dimensions fastest first, type u32, offset u64); padding to `general.alignment`; the data. A string
is a u64 length and that many bytes. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mii.errors import CheckpointError
from mii.modeling.checkpoint.mapping import MappedFile

if TYPE_CHECKING:
    from mii.modeling.checkpoint.gguf.quants import QuantType

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<B", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_MAX_DIMENSIONS = 4
_MAX_NESTING = 2


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor as stored. `shape` is in the usual order, rows first; `start` and `end` are bytes of the file."""

    name: str
    file: MappedFile
    type: QuantType
    shape: tuple[int, ...]
    start: int
    end: int


class GGUFFile:
    """The container of one file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no GGUF file, of another version, truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        try:
            self._parse(_Cursor(self.file))
        except BaseException:
            self.file.close()
            raise

    def _parse(self, cursor: _Cursor) -> None:
        self.version, tensor_count, self.metadata = _head(cursor)
        described = [_description(cursor) for _ in range(cursor.plausible(tensor_count, 24))]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise CheckpointError(f"{self.path} is corrupt: general.alignment is {alignment!r}.")
        data_start = -(-cursor.position // alignment) * alignment
        self.tensors = self._place(described, data_start, alignment)

    def _place(
        self, described: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        placed: dict[str, GGUFTensor] = {}
        end, before = 0, ""
        for name, shape, type_id, offset in sorted(described, key=lambda item: item[3]):
            if name in placed:
                raise CheckpointError(f"{self.path} is corrupt: tensor {name} occurs twice.")
            type_ = _type(self.path, name, type_id)
            tensor = GGUFTensor(name, self.file, type_, shape, data_start + offset, data_start + offset)
            tensor_end = tensor.start + _stored_bytes(self.path, name, type_, shape)
            if offset % alignment or tensor.start < end:
                raise CheckpointError(
                    f"{self.path} is corrupt: tensor {name} begins at byte {tensor.start}, inside of "
                    f"{before or 'nothing'} or off the alignment of {alignment}."
                )
            if tensor_end > self.file.size:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {tensor_end} and the file has "
                    f"{self.file.size}. Copy or download it again."
                )
            end, before = tensor_end, name
            placed[name] = GGUFTensor(name, self.file, type_, shape, tensor.start, tensor_end)
        return {name: placed[name] for name, *_ in described}

    def close(self) -> None:
        self.file.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys of one file, among them its vocabulary; needs no torch.

    Raises:
        CheckpointError: it is no GGUF file, of another version, or truncated.
    """
    file = MappedFile(path)
    try:
        return _head(_Cursor(file))[2]
    finally:
        file.close()


def _head(cursor: _Cursor) -> tuple[int, int, dict[str, Any]]:
    """What comes before the tensors' descriptions: version, count of tensors, metadata."""
    version = _version(cursor.path, cursor)
    tensor_count, key_count = cursor.number("<Q", 8), cursor.number("<Q", 8)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.plausible(key_count, 12)):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{cursor.path} is corrupt: metadata key {key!r} occurs twice.")
        metadata[key] = cursor.value(cursor.number("<I", 4))
    return version, tensor_count, metadata


def _version(path: Path, cursor: _Cursor) -> int:
    magic = cursor.take(4)
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r} instead of {_MAGIC!r}.")
    version = cursor.number("<I", 4)
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} is a big-endian GGUF file; mii reads little-endian ones.")
    raise CheckpointError(f"{path} is a GGUF file of version {version}; mii reads versions 2 and 3. Convert it again.")


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    dimensions = cursor.number("<I", 4)
    if dimensions > _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path} is corrupt: tensor {name} has {dimensions} dimensions.")
    shape = tuple(cursor.number("<Q", 8) for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<I", 4), cursor.number("<Q", 8)


def _type(path: Path, name: str, type_id: int) -> QuantType:
    from mii.modeling.checkpoint.gguf.quants import TYPES

    if type_id not in TYPES:
        raise CheckpointError(f"{path}: tensor {name} is of type {type_id}, which this version of mii does not know.")
    return TYPES[type_id]


def _stored_bytes(path: Path, name: str, type_: QuantType, shape: tuple[int, ...]) -> int:
    if shape and shape[-1] % type_.block_size:
        raise CheckpointError(
            f"{path} is corrupt: rows of {shape[-1]} in tensor {name} are no multiple of {type_.name}'s block of "
            f"{type_.block_size}."
        )
    return math.prod(shape) // type_.block_size * type_.type_size


class _Cursor:
    """A position in the header that moves on as values are read; running off the end is a CheckpointError."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.position = 0
        self._buffer: mmap.mmap = file.buffer
        self._size = file.size

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self._size:
            raise self._truncated()
        return self._buffer[start : self.position]

    def number(self, form: str, size: int) -> Any:
        return struct.unpack(form, self.take(size))[0]

    def plausible(self, count: int, least_bytes: int) -> int:
        """The count itself, if that many items of at least so many bytes can still follow."""
        if count * least_bytes > self._size - self.position:
            raise self._truncated()
        return count

    def string(self) -> str:
        return self.take(self.number("<Q", 8)).decode("utf-8", errors="replace")

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            return self._array(nesting)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is corrupt: a metadata value has the unknown type {kind}.")
        value = self.number(*_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, nesting: int) -> Any:
        kind, count = self.number("<I", 4), self.number("<Q", 8)
        if kind == _STRING:
            return self._strings(self.plausible(count, 8))
        if kind not in _SCALARS:
            return [self.value(kind, nesting + 1) for _ in range(self.plausible(count, 1))]
        form, size = _SCALARS[kind]
        values = np.frombuffer(self.take(self.plausible(count, size) * size), dtype=form[0] + form[1:])
        return values.astype(bool) if kind == _BOOL else values

    def _strings(self, count: int) -> list[str]:
        """The vocabulary and its merges: the one place of this file where speed matters, so everything is local."""
        buffer, position, read_length = self._buffer, self.position, struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(buffer, position)[0]
                strings.append(buffer[start:position].decode("utf-8", errors="replace"))
        except (struct.error, OverflowError):
            raise self._truncated() from None
        if position > self._size:
            raise self._truncated()
        self.position = position
        return strings

    def _truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated or corrupt: its header runs past the end of the file ({self._size} bytes). Copy "
            "or download it again."
        )
