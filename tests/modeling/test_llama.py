"""Llama where a rotation depends on the length of the context, and configs that are refused.

Its other options are compared with transformers in test_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii.errors import CheckpointError, UnsupportedModelError
from mii.modeling.families.llama import read_spec
from mii.modeling.models import find_family, stop_ids
from tests.oracle import Oracle, final_logits, generate, random_prompts, small_engine, tolerance

THETA = {"rope_theta": 10000.0}
LENGTHS = [1, 5, 16, 17, 40, 33]


def test_a_dynamic_rope_past_its_length_equals_transformers(make_checkpoint: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, **THETA}
    folder = make_checkpoint(rope_parameters=rope, max_position_embeddings=24)
    oracle, engine = Oracle(folder), small_engine(folder, prefix_caching=False)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    answers = generate(engine, prompts, 24)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == oracle.greedy(prompt, 24)
    for prompt in prompts[:4]:
        expected = oracle.logits(prompt)
        assert (final_logits(engine, prompt) - expected).abs().max() <= tolerance(expected, "fp32")


def test_a_yarn_factor_is_read_from_the_config(make_checkpoint: Callable[..., Path]) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.7,
        **THETA,
    }
    folder = make_checkpoint(rope_parameters={**rope, "beta_fast": 16.0, "beta_slow": 2.0})
    prompt = random_prompts(200, [50])[0]
    assert generate(small_engine(folder), [prompt], 16)[0] == Oracle(folder).greedy(prompt, 16)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' must be a positive whole number, and it is None"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive whole number, and it is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
        ({"hidden_size": 65}, "hidden_size 65 is not a multiple of 4 attention heads"),
        ({"hidden_act": "tanh"}, "'hidden_act' is 'tanh'; supported are"),
        ({"rope_scaling": {"rope_type": "cubic"}}, "rope type 'cubic' is not known"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor' above 0, and it is None"),
        ({"attention_bias": "yes"}, "'attention_bias' must be true or false"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps' must be a number above 0"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_spec({**CONFIG, **change})


def test_an_unknown_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is FooForCausalLM; supported are .*LlamaForCausalLM"):
        find_family({"architectures": ["FooForCausalLM"]})


def test_every_end_of_text_id_of_both_configs_counts() -> None:
    assert stop_ids({"eos_token_id": 2}, {"eos_token_id": [5, 7, 2]}) == (5, 7, 2)
    assert stop_ids({"eos_token_id": [3, 4]}, {}) == (3, 4)
    assert stop_ids({}, {"eos_token_id": None}) == ()
    assert stop_ids({"eos_token_id": -1}, {"eos_token_id": [-1, 4]}) == (4,)


@pytest.mark.parametrize("ids", ["2", [2, "3"], True, 2.0, [None], [[2]]])
def test_an_end_of_text_that_is_no_number_is_refused(ids: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^generation_config.json: 'eos_token_id' must be null, a number or"):
        stop_ids({"eos_token_id": 2}, {"eos_token_id": ids})
    with pytest.raises(CheckpointError, match=r"^config.json: 'eos_token_id'"):
        stop_ids({"eos_token_id": ids}, {})
