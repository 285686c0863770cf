"""A checkpoint without files: random weights of any supported config, made where they are needed.

Speed does not depend on what the weights are, only on their being ordinary numbers. So every matrix is a view of one
small noise buffer whose rows overlap: row i starts `ROW_SHIFT` numbers after row i - 1. Rows differ, no second copy of
the model ever exists, and 16 GB of weights are written at the speed of the device's memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mii.modeling.decoder import Decoder
from mii.modeling.models import find_family
from mii.modeling.parameters import Placement

ROW_SHIFT = 97
OFFSETS = 4096
STANDARD_DEVIATION = 0.02


class RandomCheckpoint:
    """What `mii.engine.build_engine` takes in place of an opened folder.

    Args:
        config: Fields of config.json.
        device: Where the tensors of `get` live.
        name: Shown in messages in place of a path.
    """

    kind = "random"

    def __init__(self, config: Mapping[str, Any], device: torch.device, name: str = "random weights") -> None:
        self.path = Path(name)
        self.config = dict(config)
        self.generation_config: dict[str, Any] = {}
        self._shapes = _shapes(self.config)
        length = OFFSETS + max(_reach(shape) for shape in self._shapes.values())
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(length, generator=generator, device=device) * STANDARD_DEVIATION
        self._noise = noise.to(torch.bfloat16)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str, dtype: torch.dtype | None = None, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The weight of this name: noise for a matrix, ones for a norm, zeros for a bias."""
        shape = self._shapes[name]
        if len(shape) == 1:
            tensor = self._noise.new_full(shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            offset = zlib.crc32(name.encode()) % OFFSETS
            tensor = torch.as_strided(self._noise, shape, (ROW_SHIFT, 1), offset)
        tensor = tensor if index is None else tensor[index]
        return tensor if dtype is None else tensor.to(dtype)

    def stored_bytes(self, name: str) -> int:
        return 2 * math.prod(self._shapes[name])

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing is read from anywhere."""

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> RandomCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a model of this config reads."""
    family = find_family(config)
    spec = family.read_spec(config)
    outline = dict(Decoder(spec, Placement(torch.device("meta"), torch.bfloat16)).parameters())
    return {name: t.stored_shape(tuple(outline[t.path].view(t.part).shape)) for name, t in family.weights(spec).items()}


def _reach(shape: tuple[int, ...]) -> int:
    """Numbers of the noise buffer that a weight of this shape covers."""
    return shape[0] if len(shape) == 1 else (shape[0] - 1) * ROW_SHIFT + shape[1]
