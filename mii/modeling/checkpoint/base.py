"""What a checkpoint offers, whatever its format."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mii.errors import CheckpointError

if TYPE_CHECKING:
    import torch


Wanted: TypeAlias = Mapping[str, tuple[slice, ...] | None]


class Checkpoint(Protocol):
    """An opened model: its configs and its tensors by Hugging Face name, read one at a time.

    A context manager; after `close` no further tensor can be read, and those already taken stay valid.
    """

    path: Path  # the folder, or the (first) .gguf file
    kind: str  # "safetensors", "bin" or "gguf"
    config: dict[str, Any]  # as in config.json; for GGUF synthesised in the same form
    generation_config: dict[str, Any]  # as in generation_config.json, {} where there is none

    def names(self) -> list[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def stored_bytes(self, name: str) -> int:
        """The bytes of a tensor as stored in the file."""
        ...

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor on the CPU.

        Args:
            name: one of `names()`.
            dtype: converted to it; None keeps the stored dtype (quantised GGUF tensors then become float32).
            index: slices of the leading dimensions, to read a part. Only the pages of that part are read.

        Returns:
            A view of the mapped file where nothing had to be converted (then it may be non-contiguous): copy it or read
            it, do not write to it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def prefetch(self, wanted: Wanted) -> None:
        """Reads tensors ahead in the background. A hint: the following `get` is right without it, only slower.

        Args:
            wanted: name: the slices that `get` will be asked for, None for all of the tensor.
        """
        ...

    def close(self) -> None:
        """Lets go of the files; harmless when repeated."""
        ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Closing:
    """Makes a class with `close` a context manager."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def checkpoint_size(checkpoint: Checkpoint) -> int:
    """The bytes of all parameters as stored."""
    return sum(checkpoint.stored_bytes(name) for name in checkpoint.names())


def no_such_tensor(path: Path, name: str, known: Iterable[str]) -> CheckpointError:
    """The error for a tensor that a checkpoint does not have; names the nearest one."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" The nearest of its {len(known)} tensors is {nearest[0]}." if nearest else ""
    return CheckpointError(f"{path} has no tensor {name}.{hint}")
