from __future__ import annotations

import pytest
import torch

from mii.ops import native


@pytest.fixture
def native_device() -> str:
    """The CPU, when its native library is built."""
    if native.library(torch.device("cpu")) is None:
        pytest.skip("the native CPU library is not built: python setup.py build_native")
    return "cpu"
