"""GPT-2: learned positions, LayerNorm, a plain MLP, and matrices stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.names import below, targets_by_role
from mii.modeling.spec import ModelSpec

ALIASES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, ALIASES)
    if read.flag("add_cross_attention"):
        raise CheckpointError("config.json: 'add_cross_attention' is true; attention to an encoder is not supported.")
    sizes = read.sizes(grouped=False)
    if not read.flag("scale_attn_weights", True):
        sizes["attention_scale"] = 1.0
    positions = read.integer("max_position_embeddings", 1024)
    by_layer = read.flag("scale_attn_by_inverse_layer_idx")
    return ModelSpec(
        family="gpt2",
        **sizes,
        intermediate_size=read.integer("n_inner", 4 * sizes["hidden_size"]),
        max_positions=positions,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.choice("activation_function", ACTIVATIONS, "gelu_new"),
        rope=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=read.flag("tie_word_embeddings", True),
        norm="layer",
        norm_bias=True,
        mlp="plain",
        learned_positions=positions,
        layer_scales=tuple(1 / (layer + 1) for layer in range(sizes["num_layers"])) if by_layer else (),
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return targets_by_role(spec, _OUTER, _LAYER, transposed=True)


_OUTER = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_BLOCK = "transformer.h.{layer}."
_LAYER = {
    "attention norm": _BLOCK + "ln_1",
    "qkv": _BLOCK + "attn.c_attn",
    "attention output": _BLOCK + "attn.c_proj",
    "mlp norm": _BLOCK + "ln_2",
    "up": _BLOCK + "mlp.c_fc",
    "down": _BLOCK + "mlp.c_proj",
}

FAMILY = Family(
    "gpt2",
    ("GPT2LMHeadModel",),
    read_spec,
    weights,
    ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    canonical=below("transformer."),
)
