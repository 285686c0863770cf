"""GPT-J's options."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "GPT-J",
    "gptj",
    {
        "partly rotated": {"rotary_dim": 24},
        "wholly rotated, inner size": {"rotary_dim": 64, "n_inner": 344},
        "tied embeddings": {"rotary_dim": 32, "tie_word_embeddings": True},
        "heads of 48": {"rotary_dim": 16, "num_attention_heads": 4, "activation_function": "gelu"},
    },
)
