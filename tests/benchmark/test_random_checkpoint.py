"""Weights that are made up in memory have the names, shapes and values that a model needs."""

from __future__ import annotations

import pytest
import torch

from mii.benchmark.random_checkpoint import STANDARD_DEVIATION, RandomCheckpoint
from mii.benchmark.shapes import SHAPES
from mii.errors import UnsupportedModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smol() -> RandomCheckpoint:
    return RandomCheckpoint(SHAPES["smollm2-135m"], CPU)


def test_names_and_shapes_are_those_of_the_public_model(smol: RandomCheckpoint) -> None:
    assert len(smol.names()) == 272
    assert "lm_head.weight" not in smol.names()
    assert smol.shape("model.embed_tokens.weight") == (49152, 576)
    assert smol.shape("model.layers.29.self_attn.k_proj.weight") == (192, 576)
    assert sum(smol.stored_bytes(name) for name in smol.names()) == 2 * 134_515_008


def test_matrices_are_noise_with_different_rows(smol: RandomCheckpoint) -> None:
    weight = smol.get("model.layers.3.mlp.up_proj.weight", torch.float32)
    assert weight.shape == (1536, 576)
    assert weight.std().item() == pytest.approx(STANDARD_DEVIATION, rel=0.05)
    assert len({tuple(row) for row in weight[:50, :4].tolist()}) == 50
    assert not torch.equal(weight, smol.get("model.layers.4.mlp.up_proj.weight", torch.float32))


def test_vectors_leave_a_norm_as_it_is(smol: RandomCheckpoint) -> None:
    assert torch.equal(smol.get("model.norm.weight"), torch.ones(576, dtype=torch.bfloat16))


def test_a_part_equals_the_same_part_of_the_whole(smol: RandomCheckpoint) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    part = smol.get(name, index=(slice(10, 20), slice(0, 7)))
    assert torch.equal(part, smol.get(name)[10:20, :7])


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="NoSuchModel"):
        RandomCheckpoint({**SHAPES["smollm2-135m"], "architectures": ["NoSuchModel"]}, CPU)
