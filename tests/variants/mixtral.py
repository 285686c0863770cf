"""Mixtral: numbers of experts, windows, both layouts of checkpoints."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "Mixtral",
    "mixtral",
    {
        "8 experts, 2 each": {"num_key_value_heads": 1},
        "5 experts, 3 each": {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 72},
        "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
        "window": {"sliding_window": 20, "intermediate_size": 72},
        "stacked experts": {"stacked": True, "intermediate_size": 72},
    },
    in_16_bits={"plain_routing": True},
)
