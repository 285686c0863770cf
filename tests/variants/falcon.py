"""Falcon's options.

In every dtype transformers rounds Falcon's ALiBi to bfloat16, which is exact for 4 heads and short texts only. With
other heads it is compared with transformers that takes ALiBi from Bloom, which is the same in float32.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

from tests.oracle import Oracle
from tests.variants import variants


class ExactAlibi(Oracle):
    """transformers' Falcon with Bloom's ALiBi."""

    def __init__(self, folder: Path, dtype: str = "fp32", device: str = "cpu") -> None:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor
        from transformers.models.falcon import modeling_falcon

        super().__init__(folder, dtype, device)
        forward = self.model.forward

        @functools.wraps(forward)
        def exact(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(modeling_falcon, "build_alibi_tensor", build_alibi_tensor):
                return forward(*args, **kwargs)

        self.model.forward = exact


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
) + variants(
    "Falcon",
    "falcon",
    {"RW: exact ALiBi of 12 heads": {**RW, "num_attention_heads": 12}},
    oracle=ExactAlibi,
    exact_dtype="fp32",
)
