"""Checkpoints in the safetensors format, one file or shards, read through a memory map.

A file is: the header's length as a little-endian u64, the header (JSON: tensor name -> dtype, shape and byte range),
the tensors' bytes. See https://github.com/huggingface/safetensors for the format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mii.errors import CheckpointError
from mii.modeling.checkpoint.base import Closing, Wanted, no_such_tensor
from mii.modeling.checkpoint.folder import Weights
from mii.modeling.checkpoint.mapping import FileRange, MappedFile, Range, converted, describe, rows_within

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_HEADER_LIMIT = 100_000_000  # the format's own


def read_header(file: MappedFile) -> dict[str, FileRange]:
    """The tensors of one file.

    Raises:
        CheckpointError: the file is truncated, is no safetensors file, or its header contradicts itself.
    """
    start, header = _header(file)
    entries = {name: _entry(file, start, name, value) for name, value in header.items() if name != "__metadata__"}
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise CheckpointError(f"{file.path} is corrupt: tensors {before} and {name} overlap.")
        end, before = entry.end, name
    return entries


def _header(file: MappedFile) -> tuple[int, dict[str, Any]]:
    if file.size < 8:
        raise CheckpointError(f"{file.path} is truncated: {file.size} bytes cannot hold a safetensors header.")
    (length,) = struct.unpack_from("<Q", file.buffer)
    if length > _HEADER_LIMIT:
        raise CheckpointError(
            f"{file.path} is not a safetensors file, or corrupt: it claims a header of {length} bytes."
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path} is truncated: its header needs {8 + length} bytes and the file has {file.size}. Copy or "
            "download it again."
        )
    try:
        header = json.loads(file.buffer[8 : 8 + length], object_pairs_hook=lambda pairs: _unique(file.path, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file.path} is not a safetensors file, or corrupt: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path} is corrupt: its header is not a JSON object.")
    return 8 + length, header


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path} is corrupt: its header names {twice!r} twice.")
    return result


def _entry(file: MappedFile, data_start: int, name: str, value: Any) -> FileRange:
    try:
        kind, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sizes_are_whole = all(type(size) is int and size >= 0 for size in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        sizes_are_whole = False
    if not sizes_are_whole:
        raise CheckpointError(f"{file.path} is corrupt: tensor {name} is described as {describe(value)}.")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise CheckpointError(f"{file.path}: tensor {name} has dtype {describe(kind)}; mii reads {known}.")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file.path} is corrupt: tensor {name} of shape {list(shape)} and dtype {kind} is given {end - start} "
            "bytes."
        )
    if data_start + end > file.size:
        raise CheckpointError(
            f"{file.path} is truncated: tensor {name} ends at byte {data_start + end} and the file has {file.size}. "
            "Copy or download it again."
        )
    return FileRange(file, dtype, shape, data_start + start, data_start + end)


class SafetensorsCheckpoint(Closing):
    """A folder's safetensors files as one checkpoint. See `mii.modeling.checkpoint.Checkpoint`."""

    kind = "safetensors"

    def __init__(self, path: Path, weights: Weights, config: dict[str, Any], generation_config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._files: list[MappedFile] = []
        try:
            self._entries = self._open(weights)
        except BaseException:
            self.close()
            raise

    def _open(self, weights: Weights) -> dict[str, FileRange]:
        found: dict[str, FileRange] = {}
        for path in weights.files:
            file = MappedFile(path)
            self._files.append(file)
            entries = read_header(file)
            if weights.weight_map is not None:
                entries = _listed(path, entries, weights.weight_map)
            for name in found.keys() & entries.keys():
                raise CheckpointError(f"Tensor {name} is in {path.name} and in {found[name].file.path.name}, so which?")
            found |= entries
        return found

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored_bytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.start

    def location(self, name: str) -> FileRange:
        """Where the bytes of a tensor lie."""
        return self._entry(name)

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        entry = self._entry(name)
        return converted(entry.file.tensor(entry.start, entry.dtype, entry.shape), dtype, index)

    def prefetch(self, wanted: Wanted) -> None:
        ranges: dict[MappedFile, list[Range]] = {}
        for name, index in wanted.items():
            entry = self._entry(name)
            rows = entry.shape[0] if entry.shape else 0
            ranges.setdefault(entry.file, []).append(rows_within((entry.start, entry.end), rows, index))
        for file, parts in ranges.items():
            file.read_ahead(parts)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []
        self._entries = {}

    def _entry(self, name: str) -> FileRange:
        try:
            return self._entries[name]
        except KeyError:
            raise no_such_tensor(self.path, name, self._entries) from None


def _listed(path: Path, entries: dict[str, FileRange], weight_map: Mapping[str, Path]) -> dict[str, FileRange]:
    wanted = [name for name, file in weight_map.items() if file == path]
    for name in wanted:
        if name not in entries:
            raise CheckpointError(f"The index places tensor {name} in {path}, which does not have it.")
    return {name: entries[name] for name in wanted}
