"""GGUF files as checkpoints: Hugging Face names and configs, tensors dequantised when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mii.errors import CheckpointError, CheckpointNotFoundError
from mii.modeling.checkpoint.base import Closing, Wanted, no_such_tensor
from mii.modeling.checkpoint.folder import split_parts
from mii.modeling.checkpoint.gguf.architectures import Source, find_architecture, map_tensors
from mii.modeling.checkpoint.gguf.config import build_config, build_generation_config
from mii.modeling.checkpoint.gguf.metadata import Metadata
from mii.modeling.checkpoint.gguf.quants import TYPES, dequantise
from mii.modeling.checkpoint.gguf.reader import GGUFFile, GGUFTensor
from mii.modeling.checkpoint.mapping import MappedFile, Range, converted, rows_within


class GGUFCheckpoint(Closing):
    """A .gguf file, or the parts of a split one, as a checkpoint. See `mii.modeling.checkpoint.Checkpoint`.

    `metadata` holds the file's own keys, the vocabulary among them.

    Args:
        path: the file; for a split one any part, the others lie beside it.

    Raises:
        CheckpointError: the file is truncated, corrupt, lacks what a model needs, or is quantised in a way that mii
            cannot read.
        UnsupportedModelError: its architecture has no mapping to Hugging Face names.
    """

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: list[GGUFFile] = []
        self._sources: dict[str, Source] = {}
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        for file in _parts(path):
            self._parts.append(GGUFFile(file))
        tensors: dict[str, GGUFTensor] = {}
        for part in self._parts:
            for name in tensors.keys() & part.tensors.keys():
                raise CheckpointError(f"Tensor {name} is in {part.path.name} and in another part of {path.name}.")
            tensors |= part.tensors
        _check_types(path, tensors)
        self.metadata = self._parts[0].metadata
        architecture = find_architecture(path, self.metadata, tensors)
        metadata = Metadata(path, self.metadata, tensors)
        self.config = build_config(architecture, metadata)
        self.generation_config: dict[str, Any] = build_generation_config(metadata)
        self._sources = map_tensors(path, architecture, self.config, tensors)

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source(name).shape

    def stored_bytes(self, name: str) -> int:
        source = self._source(name)
        start, end = _range(source)
        return end - start if source.rows is None else (end - start) * len(source.rows) // source.stored_shape[0]

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        source = self._source(name)
        if source.transposed:
            in_rows, in_columns = (*(index or ()), slice(None), slice(None))[:2]
            return _stored(source, dtype, (in_columns, in_rows)).t()
        return _stored(source, dtype, index)

    def prefetch(self, wanted: Wanted) -> None:
        ranges: dict[MappedFile, list[Range]] = {}
        for name, index in wanted.items():
            source = self._source(name)
            in_order = source.rows is None and source.shape
            extent = rows_within(_range(source), source.shape[0], index) if in_order else _range(source)
            ranges.setdefault(source.tensor.file, []).append(extent)
        for file, parts in ranges.items():
            file.read_ahead(parts)

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []
        self._sources = {}

    def _source(self, name: str) -> Source:
        try:
            return self._sources[name]
        except KeyError:
            raise no_such_tensor(self.path, name, self._sources) from None


def _parts(path: Path) -> list[Path]:
    parts = [path.with_name(name) for name in split_parts(path.name)]
    for part in parts:
        if not part.is_file():
            raise CheckpointNotFoundError(f"{path.name} is one of {len(parts)} parts, and {part} is missing.")
    return parts


def _check_types(path: Path, tensors: dict[str, GGUFTensor]) -> None:
    for tensor in tensors.values():
        if not tensor.type.readable:
            known = ", ".join(type_.name for type_ in TYPES.values() if type_.readable)
            raise CheckpointError(
                f"{path}: tensor {tensor.name} is quantised as {tensor.type.name}, which mii cannot read. Take a "
                f"file in one of these types: {known}."
            )


def _range(source: Source) -> Range:
    """The bytes of a tensor in its file."""
    tensor = source.tensor
    if source.expert is None:
        return tensor.start, tensor.end
    size = (tensor.end - tensor.start) // tensor.shape[0]
    return tensor.start + source.expert * size, tensor.start + (source.expert + 1) * size


def _gathered(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor[rows]`, by numpy: torch would start its threads, which then spin for a while where ours want to work."""
    out = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
    if out.numel():
        stored, gathered = (part.view(part.shape[0], -1).view(torch.uint8).numpy() for part in (tensor, out))
        np.take(stored, rows.numpy(), axis=0, out=gathered, mode="clip")  # any other mode takes a copy
    return out


def _stored(source: Source, dtype: torch.dtype | None, index: tuple[slice, ...] | None) -> torch.Tensor:
    """A tensor, or part of it, as it lies in the file but for the order of its rows."""
    if source.tensor.type.dtype is not None:
        return _plain(source, dtype, index)
    return _dequantised(source, dtype or torch.float32, index)


def _plain(source: Source, dtype: torch.dtype | None, index: tuple[slice, ...] | None) -> torch.Tensor:
    stored = source.tensor.type.dtype
    assert stored is not None
    tensor = source.tensor.file.tensor(_range(source)[0], stored, source.stored_shape)
    if source.rows is not None:
        tensor = _gathered(tensor, source.rows[index[0]] if index else source.rows)
        index = (slice(None), *index[1:]) if index else None
    if not source.offset:
        return converted(tensor, dtype, index)
    return converted(tensor, torch.float32, index).add(source.offset).to(dtype or stored)


def _dequantised(source: Source, dtype: torch.dtype, index: tuple[slice, ...] | None) -> torch.Tensor:
    """Only the rows and blocks that `index` touches are unpacked."""
    type_, (start, end), shape = source.tensor.type, _range(source), source.stored_shape
    columns = shape[-1]
    packed = source.tensor.file.data[start:end].view(*shape[:-1], columns // type_.block_size * type_.type_size)
    if source.rows is not None:
        packed = _gathered(packed, source.rows[index[0]] if index else source.rows)
    elif index and len(shape) > 1:
        packed = packed[index[0]]
    if index and len(shape) > 1:
        index = (slice(None), *index[1:])
    if index and len(index) == len(shape):
        first, last, step = index[-1].indices(columns)
        left = first // type_.block_size
        right = max(left, -(-last // type_.block_size))
        packed = packed[..., left * type_.type_size : right * type_.type_size]
        index = (*index[:-1], slice(first - left * type_.block_size, max(last, first) - left * type_.block_size, step))
    width = packed.shape[-1] // type_.type_size * type_.block_size
    out = torch.empty(*packed.shape[:-1], width, dtype=dtype)
    dequantise(type_, packed.reshape(-1, packed.shape[-1]), out)
    if source.offset:
        out.add_(source.offset)
    return out[index] if index else out
