"""What the tests of the native operations share: they run on the CPU library and on a card alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One unit in the last place of the stored type: the kernel and the reference may round to neighbours.
ULP = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@contextmanager
def kernels_only(module: ModuleType) -> Iterator[None]:
    """Within this block an operation that falls back to its reference fails the test."""
    name = module.__name__.rpartition(".")[2]

    def fell_back(*args: object, **options: object) -> None:
        raise AssertionError(f"{name} has no kernel for these arguments")

    with mock.patch.object(module, f"{name}_reference", fell_back):
        yield


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN everywhere: what a kernel fails to write stays visible."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def in_wider_rows(x: torch.Tensor, extra: int, shift: int = 0) -> torch.Tensor:
    """The same values as a view whose rows lie `extra` elements further apart and start `shift` elements in."""
    wide = poisoned(x.shape[0], x.shape[1] + extra + shift, dtype=x.dtype, device=str(x.device))
    view = wide[:, shift : shift + x.shape[1]]
    view.copy_(x)
    return view


def shifted(x: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A contiguous copy that starts `elements` elements past an aligned address."""
    flat = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)[elements:]
    return flat.copy_(x.flatten()).view(x.shape)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    """Equal within `ulps` units in the last place of the dtype, relative to values around 1."""
    tolerance = ULP[expected.dtype] * ulps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_close_sums(actual: torch.Tensor, expected: torch.Tensor, addend: torch.Tensor, ulps: float) -> None:
    """The same for sums with `addend`: what was added to it is rounded by itself, and may be larger than the sum."""
    scale = 1 + addend.double().abs() + expected.double().abs()
    torch.testing.assert_close(
        actual.double() / scale, expected.double() / scale, rtol=0, atol=ULP[expected.dtype] * ulps
    )
