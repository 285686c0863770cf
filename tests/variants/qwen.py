"""Qwen 1, judged by its equations in tests/qwen_oracle.py."""

from __future__ import annotations

from tests.qwen_oracle import QwenOracle, write_qwen
from tests.variants import variants

VARIANTS = variants(
    "Qwen",
    "qwen",
    {
        "as released": {},
        "heads of 128, biases, tied": {"kv_channels": 128, "no_bias": False, "tie_word_embeddings": True},
        "partly rotated, other theta": {"rotary_pct": 0.5, "rotary_emb_base": 1000, "use_dynamic_ntk": False},
        "log-n attention past 48 tokens": {"seq_length": 48, "use_dynamic_ntk": False},
    },
    write=write_qwen,
    oracle=QwenOracle,
)
