"""Checkpoints in PyTorch's own format (.bin, .pt), read with `torch.load(weights_only=True)`.

Only tensors and plain containers are unpickled: a file that wants anything else is refused, because it could run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mii.errors import CheckpointError
from mii.modeling.checkpoint.base import Closing, Wanted, no_such_tensor
from mii.modeling.checkpoint.folder import Weights
from mii.modeling.checkpoint.mapping import MappedFile, converted

_WRAPPERS = ("state_dict", "module", "model", "model_state_dict")


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file; memory-mapped where the file's format allows it (all since PyTorch 1.6).

    Raises:
        CheckpointError: the file is truncated, is no PyTorch file, or holds something other than tensors.
    """
    MappedFile(path).close()  # says what is wrong with an empty file or a Git LFS pointer
    try:
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, error)) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle may fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated, corrupt or no PyTorch checkpoint: {reason}. Copy or download it again."
        ) from error
    return _tensors(path, loaded)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _refused(path: Path, error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
        return (
            f"{path} holds Python objects other than tensors, and loading those could run code. Convert the model to "
            "safetensors in an environment that you trust."
        )
    return f"{path} is truncated, corrupt or no PyTorch checkpoint. Copy or download it again."


def _tensors(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    while isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if len(inner) != 1:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors by name.")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


class BinCheckpoint(Closing):
    """A folder's .bin or .pt files as one checkpoint. See `mii.modeling.checkpoint.Checkpoint`."""

    kind = "bin"

    def __init__(self, path: Path, weights: Weights, config: dict[str, Any], generation_config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in weights.files:
            self._add(file, load_state_dict(file), weights.weight_map)

    def _add(self, file: Path, tensors: dict[str, torch.Tensor], weight_map: Mapping[str, Path] | None) -> None:
        if weight_map is not None:
            wanted = [name for name, place in weight_map.items() if place == file]
            for name in wanted:
                if name not in tensors:
                    raise CheckpointError(f"The index places tensor {name} in {file}, which does not have it.")
            tensors = {name: tensors[name] for name in wanted}
        for name in tensors.keys() & self._tensors.keys():
            raise CheckpointError(f"Tensor {name} is in {file.name} and in {self._files[name].name}, so which?")
        self._tensors |= tensors
        self._files |= dict.fromkeys(tensors, file)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def stored_bytes(self, name: str) -> int:
        return self._tensor(name).nbytes

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        return converted(self._tensor(name).detach(), dtype, index)

    def prefetch(self, wanted: Wanted) -> None:
        """Reads whole files ahead: this format does not tell where in its file a tensor lies."""
        for path in sorted({self._files[name] for name in wanted if name in self._files}):
            file = MappedFile(path)
            file.read_ahead([(0, file.size)])
            file.close()

    def close(self) -> None:
        self._tensors = {}
        self._files = {}

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise no_such_tensor(self.path, name, self._tensors) from None
