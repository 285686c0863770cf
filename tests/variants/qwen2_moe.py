"""Qwen2-MoE: shared expert, dense layers in between, weights that add up to one or not."""

from __future__ import annotations

from tests.variants import variants

SIZES = {"num_experts": 12, "moe_intermediate_size": 72, "shared_expert_intermediate_size": 136}
VARIANTS = variants(
    "Qwen2-MoE",
    "qwen2_moe",
    {
        "shared expert": SIZES,
        "renormalised, 2 each": {**SIZES, "norm_topk_prob": True, "num_experts_per_tok": 2},
        "dense layers by step": {**SIZES, "decoder_sparse_step": 2, "num_hidden_layers": 3},
        "dense layers by number": {**SIZES, "mlp_only_layers": [0], "shared_expert_intermediate_size": 400},
        "no biases": {**SIZES, "qkv_bias": False},
        "window in every other of the lower layers": {
            **SIZES,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 3,
            "num_hidden_layers": 4,
        },
        "stacked experts": {**SIZES, "stacked": True},
    },
    in_16_bits={"plain_routing": True},
)
