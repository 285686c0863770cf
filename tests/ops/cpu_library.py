"""The CPU library once per instruction set: a copy of the file for each, because a loaded library chooses only once."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from mii.ops import native

ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two roundings of the stored type
DTYPES = tuple(TOLERANCE)


@functools.cache
def _library(isa: str) -> native.Library | str:
    """The library limited to `isa`, or the reason why there is none."""
    if native.library(torch.device("cpu")) is None:
        return "the native library is not built: python setup.py build_native"
    with tempfile.TemporaryDirectory(prefix="mii-isa-") as folder, mock.patch.dict(os.environ, {"MII_CPU_ISA": isa}):
        path = shutil.copy(native._FOLDER / "libmii_cpu.so", Path(folder, f"libmii_cpu_{isa}.so"))
        library = native.Library(path)
        info = library.build_info()  # chooses
    return library if info.endswith(f"using {isa}") else f"this processor or build has no {isa} ({info})"


@contextmanager
def using(isa: str) -> Iterator[native.Library]:
    """Within this block the operations on the CPU run with the given instruction set; skips where there is none."""
    library = _library(isa)
    if isinstance(library, str):
        pytest.skip(library)
    with mock.patch.object(native, "library", return_value=library):
        yield library


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Equal within the rounding of the dtype, relative to the size of the values."""
    tolerance = TOLERANCE[expected.dtype] * scale
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
