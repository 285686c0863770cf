"""The config fields of DeepSeek-V2 and V3 out of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.modeling.checkpoint.gguf.metadata import Metadata

DEEPSEEK = ("deepseek_v2", "deepseek_v3")


def deepseek_fields(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of latents and heads, experts, and what YaRN adds to the scale of attention.

    Files that keep the products of keys and of values apart give the sizes of the latent under the usual names, and the
    heads' own under names that end in "_mla".
    """
    rope_size, groups = config["head_dim"], metadata.integer("expert_group_count", 1)
    key, value = (metadata.integer(f"attention.{name}_mla", metadata.integer(f"attention.{name}"))
                  for name in ("key_length", "value_length"))  # fmt: skip
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in metadata.tensors,
        "q_lora_rank": metadata.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_size,
        "qk_nope_head_dim": key - rope_size,
        "v_head_dim": value,
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0),
        "n_routed_experts": metadata.integer("expert_count"),
        "n_shared_experts": metadata.integer("expert_shared_count", 0),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0),
        "norm_topk_prob": metadata.get("expert_weights_norm") is True,
        "n_group": groups,
        "topk_group": metadata.integer("expert_group_used_count", groups),
        **_choice(config["model_type"], groups),
        **_rotation(metadata, config),
    }


def _choice(kind: str, groups: int) -> dict[str, Any]:
    """The field that says how experts are chosen, which V3's config class does not have."""
    return {} if kind == "deepseek_v3" else {"topk_method": "group_limited_greedy" if groups > 1 else "greedy"}


def _rotation(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Both weights of YaRN's scale; the files have a tenth of one, and take the other to be the same."""
    weight = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not weight or config["rope_scaling"] is None:
        return {}
    weights = dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * weight, 6))
    return {name: {**config[name], **weights} for name in ("rope_scaling", "rope_parameters")}
