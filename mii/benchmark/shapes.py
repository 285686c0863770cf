"""Model shapes and request mixes that engines are compared on. Weights and prompts are random: only speed is read."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# config.json fields of the public models of these names
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama3-70b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # 12 of the 32 layers: 36 GB, so that a card of 80 GB holds them and a cache
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload: what is fed and how many tokens are to come back."""

    prompt_ids: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """`count` requests whose (prompt, answer) lengths `lengths` draws."""

    count: int
    lengths: Callable[[random.Random], tuple[int, int]]


def _normal(rng: random.Random, mean: float, high: int = 8000) -> int:
    """A length around the mean with a spread of 30 %, as in DeepSpeed-FastGen's benchmark."""
    return max(8, min(high, int(rng.gauss(mean, 0.3 * mean))))


def _long_tailed(rng: random.Random, mean: float, sigma: float) -> int:
    """A length of 4 to 1024 tokens, log-normal with this mean before the cut."""
    return max(4, min(1024, int(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


MIXES = {
    "prefill-2048": Mix(64, lambda rng: (2048, 1)),
    "fastgen-2600-60": Mix(192, lambda rng: (_normal(rng, 2600, high=3800), _normal(rng, 60))),
    "chat": Mix(768, lambda rng: (_long_tailed(rng, 230, 1.0), _long_tailed(rng, 200, 0.8))),
    "decode-128-512": Mix(384, lambda rng: (128, 512)),
    "even-1024-1024": Mix(128, lambda rng: (1024, 1024)),
    "long-7900-256": Mix(48, lambda rng: (7900, 256)),  # as long as a context of 8192 takes
    "answers-256": Mix(256, lambda rng: (128, 512)),  # of a small model it shows the host's cost
}


def make_mix(name: str, vocab: int, seed: int = 0) -> list[Job]:
    """The requests of a mix; the same for the same seed and vocabulary.

    Raises:
        KeyError: No mix has this name; `MIXES` lists them.
    """
    return _draw(MIXES[name], vocab, seed)


def make_batch(count: int, prompt: int, new_tokens: int, vocab: int, seed: int = 0) -> list[Job]:
    """`count` requests of one size."""
    return _draw(Mix(count, lambda rng: (prompt, new_tokens)), vocab, seed)


def _draw(mix: Mix, vocab: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for _ in range(mix.count):
        prompt, new_tokens = mix.lengths(rng)
        jobs.append(Job([rng.randrange(10, vocab - 10) for _ in range(prompt)], new_tokens))
    return jobs


def with_fresh_ids(jobs: list[Job], vocab: int, shift: int) -> list[Job]:
    """The same lengths with other tokens, so that a repetition finds nothing of the run before in the prefix cache."""
    span = vocab - 20
    return [Job([(token - 10 + 7919 * shift) % span + 10 for token in job.prompt_ids], job.new_tokens) for job in jobs]
