"""Qwen2 with and without windows."""

from __future__ import annotations

from tests.variants import variants

WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
VARIANTS = variants(
    "Qwen2",
    "qwen2",
    {
        "biases, tied": {"tie_word_embeddings": True},
        "heads of 128, untied": {"head_dim": 128, "num_attention_heads": 7},
        "window in the upper layers": WINDOW,
        "windows by layer types": {
            **WINDOW,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "YaRN rope": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                          "original_max_position_embeddings": 64}},
    },
)  # fmt: skip
