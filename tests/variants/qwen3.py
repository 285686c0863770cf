"""Qwen3: norms of heads, biases, windows."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "Qwen3",
    "qwen3",
    {
        "heads of 128": {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        "biases, tied": {"head_dim": 64, "attention_bias": True, "tie_word_embeddings": True},
        "window in the upper layers": {
            "head_dim": 64,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
        },
    },
)
