"""Gemma 3, and the text tower of its checkpoints that see: Gemma 2 with norms of query and key heads in place of the
caps of scores, five windows to a full layer, and a rotation of its own for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import gemma, llama
from mii.modeling.families.base import Family
from mii.modeling.rope import read_rope
from mii.modeling.spec import ModelSpec, RopeSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    if isinstance(config.get("text_config"), Mapping):
        tied = config.get("tie_word_embeddings")
        config = {**({} if tied is None else {"tie_word_embeddings": tied}), **config["text_config"]}
    config = {**_DEFAULTS, **config}
    if config.get("attn_logit_softcapping") is not None:
        raise CheckpointError("config.json: 'attn_logit_softcapping' must be null: Gemma 3 has no caps of scores.")
    read = ConfigReader(config)
    full, local = ropes(config, read.required_integer("head_dim"))
    spec = gemma.common_spec({**config, "rope_parameters": None, "rope_scaling": None})
    pattern = read.integer("sliding_window_pattern", 6)
    sliding = llama.sliding_layers(config, spec.num_layers, lambda layer: (layer + 1) % pattern != 0)
    return replace(
        spec,
        family="gemma3_text",
        block="sandwich",
        head_norm=True,
        rope=full,
        layer_ropes=tuple(local if slides else full for slides in sliding),
        windows=llama.windows(config, spec.num_layers, sliding),
        attention_scale=read.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=read.number("final_logit_softcapping", 0.0),
    )


def ropes(config: Mapping[str, Any], head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Rotations of the full layers and of those with a window: in `rope_parameters` by the layers' kind, or in fields
    of their own, where the scaling belongs to the full layers.
    """
    read = ConfigReader(config)
    by_kind = ConfigReader(read.fields("rope_parameters"))
    parameters = [by_kind.fields(kind) for kind in ("full_attention", "sliding_attention")]
    parameters[0] = {**parameters[0], **read.fields("rope_scaling")}
    thetas = (config.get("rope_theta") or 1e6, config.get("rope_local_base_freq") or 1e4)
    full, local = (
        read_rope(
            {
                "rope_parameters": {"rope_theta": theta, **given},
                "max_position_embeddings": config["max_position_embeddings"],
            },
            head_dim,
        )
        for theta, given in zip(thetas, parameters, strict=True)
    )
    return full, local


# Its configs leave out what the library's class has by default.
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def canonical(name: str) -> str:
    """The text tower's names without the tower."""
    for tower in ("language_model.model.", "model.language_model."):
        if name.startswith(tower):
            return "model." + name.removeprefix(tower)
    return name.removeprefix("language_model.")


FAMILY = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_spec,
    llama.weights,
    canonical=canonical,
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
