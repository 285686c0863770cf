"""A digest by which ranks find out that their checkpoints differ. It reads a small part, spread so that what makes
checkpoints differ is in it: another training step, a merged adapter, a file that was not copied to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mii.modeling.checkpoint import Checkpoint

__all__ = ["digest_of"]

_LEAST_ROWS, _MOST_ROWS = 8, 256
_STRIDE_BYTES = 16 << 20
"""Of a tensor, a row is read every so many bytes: a hole in a file that is larger is found."""
_MOST_COLUMNS = 65536


def digest_of(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's tensors: names, shapes, sizes in the file, and rows at a fixed stride over each."""
    state = blake2b(digest_size=8)
    for name in sorted(checkpoint.names()):
        shape, size = checkpoint.shape(name), checkpoint.stored_bytes(name)
        state.update(f"{name} {shape} {size} ".encode())
        for index in _sample(shape, size):
            part = checkpoint.get(name, torch.float32, index)
            state.update(part.contiguous().cpu().numpy().tobytes())
    return state.hexdigest()


def _sample(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Rows of a tensor, from the first to the last one, as slices of its dimensions."""
    if not all(shape):
        return
    columns = (slice(0, min(shape[-1], _MOST_COLUMNS)),) if shape else ()
    rows = prod(shape[:-1])
    count = min(rows, max(_LEAST_ROWS, min(_MOST_ROWS, size // _STRIDE_BYTES)))
    for number in range(count):
        row, place = number * (rows - 1) // max(1, count - 1), []
        for extent in reversed(shape[:-1]):
            row, at = divmod(row, extent)
            place.append(slice(at, at + 1))
        yield (*reversed(place), *columns)
