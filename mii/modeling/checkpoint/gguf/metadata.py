"""The metadata of a GGUF file, read with types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mii.errors import CheckpointError, UnsupportedModelError
from mii.modeling.checkpoint.gguf.reader import GGUFTensor


class Metadata:
    """Typed access to the keys of one file; `name` without a dot prefix belongs to the architecture.

    Every method raises CheckpointError for a value of the wrong type, and for a missing one without default.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
        self.path = path
        self.values = values
        self.tensors = tensors
        self._prefix = str(values["general.architecture"])

    def get(self, name: str) -> Any:
        return self.values.get(f"{self._prefix}.{name}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 0; a list of equal ones (a value per layer) counts as one."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise UnsupportedModelError(f"{self.path}: {self._prefix}.{name} differs from layer to layer.")
            value = value[0].item()
        if type(value) is not int or value < 0:
            raise self._wrong(name, value, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(name, value, "a number")
        # float32 in the file: 1e-05 and not 9.999999747378752e-06
        return float(str(np.float32(value)))

    def token_id(self, name: str) -> int | None:
        value = self.values.get(f"tokenizer.ggml.{name}")
        return value if type(value) is int and 0 <= value < self.rows("token_embd.weight") else None

    def rows(self, tensor: str) -> int:
        if tensor not in self.tensors or not self.tensors[tensor].shape:
            raise CheckpointError(f"{self.path} has no tensor {tensor}: it is not a whole model.")
        return self.tensors[tensor].shape[0]

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self.path} lacks the metadata key {self._prefix}.{name}.")
        return CheckpointError(f"{self.path}: metadata key {self._prefix}.{name} is {value!r} instead of {expected}.")
