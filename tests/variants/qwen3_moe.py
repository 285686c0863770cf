"""Qwen3-MoE: norms of heads, many experts, dense layers in between."""

from __future__ import annotations

from tests.variants import variants

SIZES = {"num_experts": 32, "moe_intermediate_size": 48, "head_dim": 64}
VARIANTS = variants(
    "Qwen3-MoE",
    "qwen3_moe",
    {
        "32 experts, 8 each, renormalised": {**SIZES, "norm_topk_prob": True},
        "not renormalised": {**SIZES, "num_experts_per_tok": 4},
        "dense layers by number": {**SIZES, "mlp_only_layers": [1], "norm_topk_prob": True},
        "biases, tied": {**SIZES, "attention_bias": True, "tie_word_embeddings": True},
        "60 experts, 7 each": {**SIZES, "num_experts": 60, "num_experts_per_tok": 7},
        "window": {**SIZES, "use_sliding_window": True, "sliding_window": 20},
        "stacked experts": {**SIZES, "stacked": True},
    },
    in_16_bits={"plain_routing": True},
) + variants("Qwen3-MoE", "qwen3_moe", {"no experts": {**SIZES, "mlp_only_layers": [0, 1]}})
