"""Norms on the card, over the grid of tests/ops/test_norm.py."""

from __future__ import annotations

import pytest
import torch

from tests.ops.kernel_checks import DTYPES
from tests.ops.test_norm import KINDS, WIDTHS, check_kernel


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype: torch.dtype, kind: int, width: int) -> None:
    check_kernel("cuda", dtype, kind, width)
