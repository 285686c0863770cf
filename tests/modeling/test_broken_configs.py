"""Whatever a field of a config holds, a family reads it or refuses it in a sentence: no other error comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mii.errors import CheckpointError, MIIError
from mii.modeling.models import find_family
from tests.checkpoints import DEFAULTS
from tests.variants import Variant, all_variants

VALUES = ("x", -1, 0, 1.5, True, None, math.nan, math.inf, [], [1], ["x"], {}, {"a": 1})
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
     "attention_factor": 1.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0,
     "attention_factor": 1.0, "original_max_position_embeddings": 32},
)  # fmt: skip


def config_of(variant: Variant) -> dict[str, Any]:
    from transformers import AutoConfig

    about_weights = ("stacked", "plain_routing", "std")
    fields = {name: value for name, value in variant.config.items() if name not in about_weights}
    config: dict[str, Any] = AutoConfig.for_model(variant.model_type, **{**DEFAULTS, **fields}).to_dict()
    return {**config, "architectures": None}


def first_of_each_family() -> list[Variant]:
    """But Qwen 1, which transformers has no class for."""
    first: dict[str, Variant] = {}
    for variant in all_variants():
        if variant.model_type != "qwen":
            first.setdefault(variant.model_type, variant)
    return list(first.values())


def broken(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The config with each field left out or changed, and each field of an object in it."""
    for name, given in config.items():
        yield {other: value for other, value in config.items() if other != name}
        inner = [{**given, field: value} for field in given for value in VALUES] if isinstance(given, dict) else []
        for value in (*VALUES, *inner):
            yield {**config, name: value}


def refusal(config: Mapping[str, Any]) -> str:
    """The sentence that a config is refused with; a full stop where it is read."""
    try:
        find_family(config).read_spec(config)
    except MIIError as error:
        return str(error)
    return "."


@pytest.mark.parametrize("variant", first_of_each_family(), ids=lambda variant: variant.model_type)
def test_a_broken_field_is_read_or_refused_in_a_sentence(variant: Variant) -> None:
    config = config_of(variant)
    assert find_family(config).read_spec(config).vocab_size == config["vocab_size"]
    for changed in broken(config):
        assert refusal(changed).endswith(".")


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_a_broken_rotation_is_read_or_refused_in_a_sentence(rope: dict[str, Any]) -> None:
    config = {**config_of(first_of_each_family()[0]), **DEFAULTS, "model_type": "llama", "head_dim": 64}
    scaling = {**rope, "rope_theta": 10000.0}
    for form in ("rope_scaling", "rope_parameters"):
        without = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
        find_family(config).read_spec({**without, form: scaling})
        for changed in broken(scaling):
            assert refusal({**without, form: changed}).endswith(".")


@pytest.mark.parametrize("value", ["LlamaForCausalLM", 5, {}, [None], [["LlamaForCausalLM"]]])
def test_architectures_that_are_no_list_of_names_are_refused(value: Any) -> None:
    config = {**DEFAULTS, "model_type": [], "architectures": value}
    with pytest.raises(MIIError, match="architecture"):
        find_family(config)


@pytest.mark.parametrize("value", [{"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"])
def test_quantised_weights_are_refused(value: Any) -> None:
    config = {**DEFAULTS, "architectures": ["LlamaForCausalLM"]}
    assert find_family({**config, "quantization_config": None}).name == "llama"
    with pytest.raises(MIIError, match=r"'quant_method' is 'fp8'|'quantization_config' must be null or an object"):
        find_family({**config, "quantization_config": value})


@pytest.mark.parametrize("value", ["", 0, False, [], {}])
def test_an_activation_that_is_no_name_is_not_taken_for_a_missing_one(value: Any) -> None:
    config = {**DEFAULTS, "architectures": ["LlamaForCausalLM"], "hidden_act": value}
    with pytest.raises(CheckpointError, match=r"'hidden_act' is .*; supported are"):
        find_family(config).read_spec(config)


def test_both_forms_of_a_rotation_may_say_the_same_or_complete_each_other_but_not_contradict() -> None:
    config = {**DEFAULTS, "architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_theta": 500.0}}
    read = find_family(config).read_spec
    rope = read({**config, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 500.0}}).rope
    assert rope is not None
    assert (rope.theta, rope.kind, rope.scaling["factor"]) == (500.0, "linear", 4.0)
    config["rope_parameters"] = {"rope_type": "default"}
    with pytest.raises(CheckpointError, match="'rope_type' is 'default' in 'rope_parameters' and 'linear' in 'rope_"):
        read({**config, "rope_scaling": {"type": "linear", "factor": 4.0}})


def test_a_rotation_that_does_not_turn_is_refused() -> None:
    config = {**DEFAULTS, "architectures": ["LlamaForCausalLM"], "rope_theta": 1}
    with pytest.raises(CheckpointError, match="'rope_theta' must be a number above 1, and it is 1"):
        find_family(config).read_spec(config)
