"""DeepSeek-V2: latents of keys and queries, groups of experts, the rotation's part in the scale."""

from __future__ import annotations

from tests.variants import variants

SIZES = {
    "num_key_value_heads": 3,
    "kv_lora_rank": 40,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 72,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
VARIANTS = variants(
    "DeepSeek-V2",
    "deepseek_v2",
    {
        "as V2-Lite, YaRN": {**SIZES, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        "other scale of YaRN": {**SIZES, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        "latent of queries, groups": {
            **SIZES,
            "q_lora_rank": 56,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
        "heads of 192": {
            **SIZES,
            "kv_lora_rank": 72,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "biases": {**SIZES, "q_lora_rank": 56, "attention_bias": True, "mlp_bias": True, "n_shared_experts": 1},
        "tied, experts in every layer": {**SIZES, "tie_word_embeddings": True, "first_k_dense_replace": 0},
        "stacked experts": {**SIZES, "stacked": True},
    },
    in_16_bits={"plain_routing": True},
) + variants(
    "DeepSeek-V2", "deepseek_v2", {"no experts, wide values": {**SIZES, "v_head_dim": 40, "first_k_dense_replace": 2}}
)
