"""How a decoder's parts hang together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mii.modeling.parameters import Linear
from tests.oracle import small_engine


@pytest.mark.parametrize("tied", [False, True])
def test_products_know_the_weight_of_the_next_one(make_checkpoint: Callable[..., Path], tied: bool) -> None:
    model = small_engine(make_checkpoint(tie_word_embeddings=tied)).runner.model
    first, last = model.blocks[0], model.blocks[-1]
    assert first.attention.qkv.following is first.attention.output.packed
    assert first.attention.output.following is first.mlp.up.packed
    assert first.mlp.up.following is first.mlp.down.packed
    assert first.mlp.down.following is model.blocks[1].attention.qkv.packed
    assert last.mlp.down.following is model.head.packed
    assert model.head.following is first.attention.qkv.packed
    assert all(module.following for _, module in model.modules() if isinstance(module, Linear))
