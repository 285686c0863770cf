"""Activations on the card, over the grid of tests/ops/test_activation.py."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi
from tests.ops.kernel_checks import DTYPES
from tests.ops.test_activation import WIDTHS, check_kernel


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", abi.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype: torch.dtype, kind: str, width: int) -> None:
    check_kernel("cuda", dtype, kind, width)
