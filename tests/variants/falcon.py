"""Falcon's options. ALiBi with counts of heads whose slopes are exact in bfloat16, as transformers computes them."""

from __future__ import annotations

from tests.variants import variants

NEW = {"new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 2}
RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True, "num_attention_heads": 4}
VARIANTS = variants(
    "Falcon",
    "falcon",
    {
        "7B: one key head, parallel": {},
        "40B: groups, two norms": NEW,
        "11B: groups, one norm": {**NEW, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 344},
        "RW: ALiBi, sequential, biases": RW,
        "RW: rotary": {**RW, "alibi": False},
        "parallel with a key head for each": {"multi_query": False, "bias": True},
        "one key head, sequential": {"parallel_attn": False, "alibi": True, "num_attention_heads": 4},
        "untied, relu, other theta": {
            "tie_word_embeddings": False,
            "activation": "relu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
)
