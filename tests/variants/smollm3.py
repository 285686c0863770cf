"""SmolLM3: layers without rotation, and windows in them."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "SmolLM3",
    "smollm3",
    {
        "every fourth layer not rotated": {"num_hidden_layers": 5, "pad_token_id": 0},
        "named layers not rotated, with windows, biases": {
            "num_hidden_layers": 3,
            "pad_token_id": 0,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 20,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    },
)
