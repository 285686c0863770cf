"""Rotary tables against transformers' own rotary embedding, for every kind of scaling and both forms of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mii.errors import CheckpointError
from mii.modeling.rope import context_length, read_rope, rope_rows, rope_table, switch_length

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": [1 + i / 40 for i in range(32)],
    "long_factor": [1 + i / 3 for i in range(32)],
    "original_max_position_embeddings": 64,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 10.0, "beta_slow": 0.5, "truncate": False},
    {"rope_type": "yarn", "factor": 16.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3},
    {"rope_type": "longrope", **LONG},
    {"rope_type": "longrope", "factor": 8.0, **LONG},
    {"rope_type": "longrope", "attention_factor": 1.3, **LONG},
]


def reference(scaling: dict[str, Any], length: int) -> torch.Tensor:
    """The rows of a context of `length` tokens."""
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={**scaling, "rope_theta": 5000.0},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.arange(length)[None])
    return torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=-1)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_tables_equal_transformers(scaling: dict[str, Any], form: str) -> None:
    fields = {**scaling, "rope_theta": 5000.0} if form == "rope_parameters" else scaling
    config = {form: fields, "rope_theta": 5000.0, "max_position_embeddings": 256}
    rope = read_rope(config, 64)
    table = rope_table(rope, 256, torch.device("cpu"), long=True)
    torch.testing.assert_close(table, reference(scaling, 256), atol=2e-5, rtol=0)
    short = rope_table(rope, 64, torch.device("cpu"))
    torch.testing.assert_close(short, reference(scaling, 64), atol=2e-5, rtol=0)


def test_long_factors_serve_contexts_past_the_trained_length() -> None:
    config = {"rope_scaling": {"type": "longrope", **LONG}, "max_position_embeddings": 256}
    assert switch_length(read_rope(config, 64)) == 64
    assert switch_length(read_rope({**config, "original_max_position_embeddings": 32}, 64)) == 32
    same = {"rope_scaling": {"type": "su", **LONG, "long_factor": LONG["short_factor"]}, "max_position_embeddings": 256}
    assert switch_length(read_rope(same, 64)) == 0
    assert switch_length(read_rope({"max_position_embeddings": 256}, 64)) == 0


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 31, "needs 'long_factor' with 32 numbers above 0, one for each frequency, and it has 31"),
        (None, "and it has None"),
        ([1.0] * 31 + [0], "and it has 32"),
    ],
)
def test_long_factors_that_do_not_fit_are_refused(factors: Any, message: str) -> None:
    scaling = {"type": "longrope", **LONG, "long_factor": factors}
    with pytest.raises(CheckpointError, match=message):
        read_rope({"rope_scaling": scaling, "max_position_embeddings": 256}, 64)


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
