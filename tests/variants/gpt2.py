"""GPT-2's options."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "GPT-2",
    "gpt2",
    {
        "plain": {},
        "untied, inner size, relu": {"tie_word_embeddings": False, "n_inner": 344, "activation_function": "relu"},
        "unscaled attention": {"scale_attn_weights": False},
        "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        "large epsilon": {"layer_norm_epsilon": 0.1},
    },
)
