"""Rotary embedding and KV write on the card, over the grid of tests/ops/test_rope_kv.py."""

from __future__ import annotations

import pytest
import torch

from tests.ops.kernel_checks import DTYPES
from tests.ops.test_rope_kv import HEADS, Heads, check_kernel


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "-".join(map(str, heads)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype: torch.dtype, heads: Heads, interleaved: bool) -> None:
    check_kernel("cuda", dtype, heads, interleaved)
