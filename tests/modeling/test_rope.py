"""Rotary tables against transformers' own rotary embedding, for every kind of scaling and both forms of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mii.modeling.rope import context_length, read_rope, rope_rows, rope_table

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 10.0, "beta_slow": 0.5, "truncate": False},
    {"rope_type": "yarn", "factor": 16.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3},
]


def reference(scaling: dict[str, Any], positions: int) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={**scaling, "rope_theta": 5000.0},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
    return torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=-1)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_tables_equal_transformers(scaling: dict[str, Any], form: str) -> None:
    fields = {**scaling, "rope_theta": 5000.0} if form == "rope_parameters" else scaling
    config = {form: fields, "rope_theta": 5000.0, "max_position_embeddings": 256}
    table = rope_table(read_rope(config, 64), 256, torch.device("cpu"))
    torch.testing.assert_close(table, reference(scaling, 256), atol=2e-5, rtol=0)


def test_the_old_name_of_the_type_is_read_too() -> None:
    assert read_rope({"rope_scaling": {"type": "linear", "factor": 2}}, 64).kind == "linear"


def test_rows_of_a_long_prompt_have_the_base_of_its_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    spec = read_rope({"rope_scaling": scaling, "rope_theta": 5000.0, "max_position_embeddings": 256}, 64)
    torch.testing.assert_close(rope_rows(spec, 0, 300, 300), reference(scaling, 300), atol=2e-5, rtol=0)
    torch.testing.assert_close(rope_rows(spec, 300, 1, 300)[0], reference(scaling, 301)[300], atol=2e-5, rtol=0)


def test_interpolation_stretches_the_context() -> None:
    def length(**scaling: Any) -> int:
        return context_length(read_rope({"rope_scaling": scaling, "max_position_embeddings": 100}, 64), 100)

    assert length(rope_type="linear", factor=4.0) == 400
    assert length(rope_type="dynamic", factor=2.0) == 200
    assert length(rope_type="yarn", factor=4.0, original_max_position_embeddings=50) == 200
    assert length(rope_type="llama3", factor=8.0, **LLAMA3) == 100
