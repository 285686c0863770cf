"""What the families with LayerNorms read out of a config; configs that they refuse, with the field in question."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mii.errors import CheckpointError, UnsupportedModelError
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import FAMILIES
from mii.modeling.models import find_family
from mii.modeling.spec import ModelSpec

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT_SIZES = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {**SIZES, "ffn_dim": 256},
    "GPT2LMHeadModel": {**GPT_SIZES, "n_positions": 128},
    "GPTJForCausalLM": {**GPT_SIZES, "n_positions": 128, "rotary_dim": 8},
    "GPTNeoXForCausalLM": {**SIZES, "intermediate_size": 256, "rotary_pct": 0.25, "rotary_emb_base": 10000},
    "BloomForCausalLM": {"vocab_size": 100, "n_embed": 64, "n_layer": 2, "num_attention_heads": 4},
    "PhiForCausalLM": {**SIZES, "intermediate_size": 256, "partial_rotary_factor": 0.5},
    "FalconForCausalLM": SIZES,
    "RWForCausalLM": {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4, "n_head_kv": 2},
}


def read(architecture: str, **change: Any) -> ModelSpec:
    return FAMILIES[architecture].read_spec({**CONFIGS[architecture], **change})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_configs_as_the_models_were_published_with_are_read(architecture: str) -> None:
    spec = read(architecture)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.q_heads, spec.head_dim) == (100, 64, 2, 4, 16)
    assert spec.intermediate_size == 256
    assert spec.kv_heads == {"FalconForCausalLM": 1, "RWForCausalLM": 2}.get(architecture, 4)


def test_a_part_of_a_head_is_rotated_as_the_config_says() -> None:
    rotated = {name: rope.rotary_dim for name in CONFIGS if (rope := read(name).rope) is not None}
    assert rotated == {
        "GPTJForCausalLM": 8,
        "GPTNeoXForCausalLM": 4,
        "PhiForCausalLM": 8,
        "FalconForCausalLM": 16,
        "RWForCausalLM": 16,
    }


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("OPTForCausalLM", {"ffn_dim": None}, "'ffn_dim' must be a positive whole number, and it is None"),
        ("OPTForCausalLM", {"enable_bias": 1}, "'enable_bias' must be true or false, and it is 1"),
        ("OPTForCausalLM", {"activation_function": "gelu_10"}, "'activation_function' is 'gelu_10'; supported are"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 0}, "'word_embed_proj_dim' must be a positive whole number"),
        ("OPTForCausalLM", {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of 5 attention heads"),
        ("GPT2LMHeadModel", {"n_embd": None}, "'hidden_size' must be a positive whole number, and it is None"),
        ("GPT2LMHeadModel", {"hidden_size": 128}, "'hidden_size' is 128 and 'n_embd' is 64, but they mean the same"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "'add_cross_attention' is true"),
        ("GPT2LMHeadModel", {"layer_norm_epsilon": "small"}, "'layer_norm_epsilon' must be a number above 0"),
        ("GPTJForCausalLM", {"rotary_dim": 17}, "'rotary_dim' is 17; it must be even and at most the head size of 16"),
        ("GPTJForCausalLM", {"rotary_dim": 18}, "'rotary_dim' is 18"),
        ("GPTJForCausalLM", {"rotary_dim": None}, "'rotary_dim' must be a positive whole number, and it is None"),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.2}, "of a head of 16 is 3 dimensions; it must be an even number"),
        ("GPTNeoXForCausalLM", {"rotary_pct": 1.5}, "is 24 dimensions; it must be an even number from 2 to 16"),
        ("GPTNeoXForCausalLM", {"rotary_pct": -1}, "'partial_rotary_factor' must be a number above 0, and it is -1"),
        ("GPTNeoXForCausalLM", {"rope_scaling": "linear"}, "'rope_scaling' must be null or an object"),
        ("GPTNeoXForCausalLM", {"rope_scaling": {"type": ["linear"]}}, "rope type \"['linear']\" is not known"),
        ("GPTNeoXForCausalLM", {"rope_scaling": {"type": "linear"}}, "needs 'factor' above 0"),
        ("BloomForCausalLM", {"n_inner": 128}, "'n_inner' is 128; in Bloom it is 4 times the hidden size 64"),
        ("BloomForCausalLM", {"hidden_size": 32}, "'hidden_size' is 32 and 'n_embed' is 64"),
        ("PhiForCausalLM", {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
        ("PhiForCausalLM", {"qk_layernorm": "no"}, "'qk_layernorm' must be true or false"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "'num_ln_in_parallel_attn' is 2; it can be 1, or 2 with"),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "is 3; it can be 1"),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 3}, "cannot share 3 key/value heads"),
        ("FalconForCausalLM", {"activation": "mish"}, "'activation' is 'mish'; supported are"),
        ("FalconForCausalLM", {"alibi": "yes"}, "'alibi' must be true or false"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_field(
    architecture: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(architecture, **change)


def test_a_field_may_have_one_value_under_two_names() -> None:
    assert read("GPT2LMHeadModel", hidden_size=64).hidden_size == 64
    assert ConfigReader({"a": None, "b": 3}, {"a": ("b",)}).required_integer("a") == 3


def test_an_unknown_architecture_lists_the_supported_ones_and_how_to_add_one() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        find_family({"architectures": ["FooForCausalLM"]})
    for architecture in CONFIGS:
        assert architecture in str(caught.value)
    assert "docs/adding-a-model.md" in str(caught.value)
