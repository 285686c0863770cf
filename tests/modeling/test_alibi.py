"""The slopes of ALiBi, against transformers' for Bloom and the values of the paper."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from mii.modeling.alibi import alibi_slopes


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 17, 31, 32, 71, 112])
def test_slopes_equal_transformers(heads: int) -> None:
    expected = _get_alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), expected, rtol=1e-5, atol=0)


def test_eight_heads_have_the_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(0.5**power for power in range(1, 9))
