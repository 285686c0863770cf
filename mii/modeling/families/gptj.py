"""GPT-J: attention and MLP side by side behind one norm, and rotary positions of neighbouring dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.gpt2 import ALIASES
from mii.modeling.families.names import below, targets_by_role
from mii.modeling.spec import ModelSpec, RopeSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, ALIASES)
    sizes = read.sizes(grouped=False)
    head_dim = sizes["head_dim"]
    rotary_dim = read.required_integer("rotary_dim") if "rotary_dim" in config else 64
    if rotary_dim > head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: 'rotary_dim' is {rotary_dim}; it must be even and at most the head size of {head_dim}."
        )
    return ModelSpec(
        family="gptj",
        **sizes,
        intermediate_size=read.integer("n_inner", 4 * sizes["hidden_size"]),
        max_positions=read.integer("max_position_embeddings", 2048),
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.choice("activation_function", ACTIVATIONS, "gelu_new"),
        rope=RopeSpec(theta=10000.0, rotary_dim=rotary_dim, interleaved=True),
        mlp_bias=True,
        tied_embeddings=read.flag("tie_word_embeddings"),
        head_bias=True,
        norm="layer",
        norm_bias=True,
        block="parallel",
        mlp="plain",
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return targets_by_role(spec, _OUTER, _LAYER)


_OUTER = {"embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"}
_BLOCK = "transformer.h.{layer}."
_LAYER = {
    "attention norm": _BLOCK + "ln_1",
    "q": _BLOCK + "attn.q_proj",
    "k": _BLOCK + "attn.k_proj",
    "v": _BLOCK + "attn.v_proj",
    "attention output": _BLOCK + "attn.out_proj",
    "up": _BLOCK + "mlp.fc_in",
    "down": _BLOCK + "mlp.fc_out",
}

FAMILY = Family(
    "gptj",
    ("GPTJForCausalLM",),
    read_spec,
    weights,
    ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    canonical=below("transformer."),
)
