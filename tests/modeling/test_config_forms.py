"""What a config leaves out is the default of the library's class, and older forms of a config mean what newer ones do:
compared with the config that transformers makes of the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch

from mii.errors import CheckpointError
from mii.modeling.models import find_family
from mii.modeling.rope import rope_table, switch_length
from mii.modeling.spec import ModelSpec, RopeSpec
from tests.modeling.test_broken_configs import config_of, first_of_each_family
from tests.variants import Variant, all_variants

VARIANTS = [variant for variant in all_variants() if variant.model_type != "qwen"]  # which has no class there


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a family reads out of a config, with what a rotation does in place of how it is written."""
    spec = find_family(config).read_spec(config)
    found = {field.name: getattr(spec, field.name) for field in fields(ModelSpec)}
    return {**found, "rope": rotation(spec.rope), "layer_ropes": [rotation(rope) for rope in spec.layer_ropes]}


def rotation(rope: RopeSpec | None) -> Any:
    if rope is None:
        return None
    tables = [rope_table(rope, 30, torch.device("cpu"), long=long).tolist() for long in (False, True)]
    return rope.theta, rope.rotary_dim, rope.kind, rope.interleaved, switch_length(rope), tables


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what transformers fills in."""
    from transformers import CONFIG_MAPPING

    given = {name: value for name, value in config.items() if name != "architectures"}
    return {**CONFIG_MAPPING[config["model_type"]].from_dict(given).to_dict(), "architectures": None}


def assert_read_alike(config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    ours, theirs = meaning(config), meaning(other)
    assert {name for name in ours if ours[name] != theirs[name]} == set()


@pytest.mark.parametrize("variant", first_of_each_family(), ids=lambda variant: variant.model_type)
def test_what_a_config_leaves_out_is_the_default_of_the_librarys_class(variant: Variant) -> None:
    config, read = config_of(variant), 0
    if "n_head" not in config:  # so many that any number of key heads divides them
        config |= {"num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 128 * 80}
    config |= {name: 4 for name in ("sliding_window", "sliding_window_pattern") if name in config}
    for name in sorted(config.keys() - {"model_type", "architectures", "layer_types"}):
        less = {other: value for other, value in config.items() if other not in (name, "layer_types")}
        if not refused(less):
            assert_read_alike(less, completed(less))
            read += 1
        elif "must be a positive whole number, and it is None" not in refused(less):  # a size
            assert refused(completed(less)), (name, refused(less))
    assert read > 10


def refused(config: Mapping[str, Any]) -> str:
    """Why a config is not read; empty where it is."""
    try:
        meaning(config)
    except CheckpointError as error:
        return str(error)
    return ""


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 wrote it: rotations in fields of their own, no kinds of layers, other names."""
    found = {name: value for name, value in config.items() if name not in ("rope_parameters", "layer_types", "dtype")}
    ropes = dict(config.get("rope_parameters") or {})
    if "full_attention" in ropes:
        found["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = dict(ropes["full_attention"])
    theta, partial = ("rotary_emb_base", "rotary_pct") if config["model_type"] == "gpt_neox" else (None, None)
    for name, old in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if name in ropes:
            found[old or name] = ropes.pop(name)
    kind = ropes.pop("rope_type", "default")
    name = "rope_type" if config["model_type"] == "gemma3_text" else "type"  # which was gone when Gemma 3 came
    found["rope_scaling"] = None if kind == "default" else {name: kind, **ropes}
    return {**found, "torch_dtype": "float32", "transformers_version": "4.40.0"}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_config_in_the_form_of_older_versions_means_the_same(variant: Variant) -> None:
    config = config_of(variant)
    old = older(config)
    if config["model_type"] == "exaone4" and config["sliding_window"] is None:
        assert_read_alike(old, config)  # the library divides by zero
    else:
        assert_read_alike(old, completed(old))
    if "layer_types" not in variant.config:
        assert_read_alike(old, config)
