"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side behind one norm, partly rotated heads, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.llama import rotary_spec
from mii.modeling.families.names import targets_by_role
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config)
    eps = read.number("layer_norm_eps", 1e-5)
    return replace(
        rotary_spec("phi", read, norm_eps=eps, activation="gelu_new", rotated=0.5),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm="layer",
        norm_bias=True,
        block="parallel",
        mlp="plain",
        head_norm=read.flag("qk_layernorm"),
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return targets_by_role(spec, _OUTER, _LAYER | (_HEAD_NORMS if spec.head_norm else {}))


_OUTER = {"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"}
_BLOCK = "model.layers.{layer}."
_LAYER = {
    "attention norm": _BLOCK + "input_layernorm",
    "q": _BLOCK + "self_attn.q_proj",
    "k": _BLOCK + "self_attn.k_proj",
    "v": _BLOCK + "self_attn.v_proj",
    "attention output": _BLOCK + "self_attn.dense",
    "up": _BLOCK + "mlp.fc1",
    "down": _BLOCK + "mlp.fc2",
}
_HEAD_NORMS = {"q norm": _BLOCK + "self_attn.q_layernorm", "k norm": _BLOCK + "self_attn.k_layernorm"}

FAMILY = Family("phi", ("PhiForCausalLM",), read_spec, weights)
