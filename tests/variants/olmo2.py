"""OLMo-2: norms of what layers add, and over all heads at once."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "OLMo-2",
    "olmo2",
    {
        "norms over all heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "heads of 128, biases, tied": {
            "hidden_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
)
