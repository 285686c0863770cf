"""GPT-NeoX and Pythia: attention and MLP side by side, each behind a norm of its own, and partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.llama import rotary_spec
from mii.modeling.families.names import grouped_rows, joint_layer, targets_by_role
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, {"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)})
    bias, eps = read.flag("attention_bias", True), read.number("layer_norm_eps", 1e-5)
    return replace(
        rotary_spec("gpt_neox", read, norm_eps=eps, activation="gelu", rotated=0.25, grouped=False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        norm="layer",
        norm_bias=True,
        block="parallel_two_norms" if read.flag("use_parallel_residual", True) else "sequential",
        mlp="plain",
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return targets_by_role(spec, _OUTER, _LAYER, qkv_rows=grouped_rows(spec.q_heads, spec.kv_heads, spec.head_dim))


def canonical(name: str) -> str:
    """The head was called embed_out."""
    return name.replace("embed_out.", "lm_head.")


_OUTER = {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"}
_BLOCK = "gpt_neox.layers.{layer}."
_LAYER = {
    **joint_layer(_BLOCK + "attention"),
    "attention norm": _BLOCK + "input_layernorm",
    "mlp norm": _BLOCK + "post_attention_layernorm",
}

FAMILY = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    read_spec,
    weights,
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),  # a table and the causal mask
    canonical=canonical,
)
