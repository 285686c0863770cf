"""The engine on a card: transformers' tokens, the same with and without graphs, and the memory given back.

Tolerances: in bfloat16 (8 bits of mantissa) and float16 (11 bits) a logit is the sum of hundreds of rounded products
whose order differs between two correct programs; the largest difference allowed is 8 units in the last place of the
largest logit. Where two tokens' logits are closer than that, greedy decoding may choose either: such a choice ends a
comparison.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.engine import Engine
from tests.oracle import DTYPES, Oracle, generate, random_prompts, small_engine

LENGTHS = [1, 5, 16, 17, 40, 33, 100]
VARIANTS: dict[str, dict[str, Any]] = {
    "heads_of_64": {},
    "heads_of_128": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2},
    "heads_of_80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 4},
    "window": {"model_type": "mistral", "sliding_window": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def card_engine(folder: Path, dtype: str, **options: Any) -> Engine:
    return small_engine(folder, device="cuda", dtype=dtype, **{"block_size": 64, **options})


def tolerance(logits: torch.Tensor, dtype: str) -> float:
    """8 units in the last place of the largest logit."""
    return float(8 * torch.finfo(DTYPES[dtype]).eps * logits.abs().max()) if dtype != "fp32" else 1e-3


def assert_same_but_for_ties(answer: list[int], prompt: list[int], oracle: Oracle, dtype: str) -> None:
    """Follows an answer through the oracle's logits: each token is its best one, or within rounding of it."""
    full = torch.tensor([prompt + answer], device=oracle.device)
    with torch.inference_mode():
        logits = oracle.model(full).logits[0, len(prompt) - 1 : -1].float().cpu()
    for row, token in zip(logits, answer, strict=True):
        assert row.max() - row[token] <= tolerance(row, dtype), (
            f"token {token} is not the best by {row.max() - row[token]}"
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(
    variant: str, dtype: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(**VARIANTS[variant])
    oracle, engine = Oracle(folder, dtype, "cuda"), card_engine(folder, dtype)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    for _ in range(3):  # eager, captured, replayed
        answers = generate(engine, prompts, 24)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_same_but_for_ties(answer, prompt, oracle, dtype)
            if dtype == "fp32":
                assert answer == oracle.greedy(prompt, 24)
    for uid, prompt in enumerate(prompts[:4]):
        expected = oracle.logits(prompt)
        got = engine.put([uid], [prompt])[0].float().cpu()
        assert (got - expected).abs().max() <= tolerance(expected, dtype)
    engine.destroy()


def test_a_replayed_step_gives_what_the_launched_one_gave(tiny_llama: Path) -> None:
    engine = card_engine(tiny_llama, "bf16", prefix_caching=False)
    assert engine.runner is not None
    assert engine.runner.graphs is not None
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=4)
    batches = [random_prompts(engine.vocab_size, LENGTHS, seed=seed) for seed in range(3)]
    launched = [generate(engine, prompts, 30, sampling=sampling) for prompts in batches]
    captured = [generate(engine, prompts, 30, sampling=sampling) for prompts in batches]
    assert len(engine.runner.graphs) >= 3
    replayed = [generate(engine, prompts, 30, sampling=sampling) for prompts in batches]
    assert launched == captured == replayed


def test_64_mixed_requests_equal_one_by_one(tiny_llama: Path) -> None:
    engine = card_engine(tiny_llama, "fp32", max_tokens=128, max_sequences=64)
    prompts = random_prompts(engine.vocab_size, [1 + (7 * i) % 61 for i in range(64)])
    together = generate(engine, prompts, 12)
    assert together == [generate(engine, [prompt], 12)[0] for prompt in prompts]


def test_64_mixed_requests_in_bf16_differ_by_ties_only(tiny_llama: Path) -> None:
    engine, oracle = (
        card_engine(tiny_llama, "bf16", max_tokens=128, max_sequences=64),
        Oracle(tiny_llama, "bf16", "cuda"),
    )
    prompts = random_prompts(engine.vocab_size, [1 + (7 * i) % 61 for i in range(64)])
    for prompt, answer in zip(prompts, generate(engine, prompts, 12), strict=True):
        assert_same_but_for_ties(answer, prompt, oracle, "bf16")


def test_forced_preemption_loses_nothing(tiny_llama: Path) -> None:
    roomy, tight = (
        card_engine(tiny_llama, "fp32", block_size=16),
        card_engine(tiny_llama, "fp32", block_size=16, blocks=9),
    )
    prompts = random_prompts(roomy.vocab_size, [30, 25, 40, 12])
    assert generate(tight, prompts, 60) == generate(roomy, prompts, 60)
    assert tight.stats().preemptions > 0


def test_an_answer_that_stops_early_leaves_no_surplus_token(tiny_llama: Path) -> None:
    engine = card_engine(tiny_llama, "fp32")
    prompts = random_prompts(engine.vocab_size, [8, 12])
    free = generate(engine, prompts, 30)
    stop = free[0][6]
    for uid, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=30, stop_ids=(stop,)))
    answers: list[list[int]] = [[], []]
    while engine.has_work:
        for output in engine.step():
            answers[output.uid] += output.token_ids
    for answer, whole in zip(answers, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert answer == whole[:end]


def test_destroy_gives_the_memory_back(tiny_llama: Path) -> None:
    generate(card_engine(tiny_llama, "bf16"), [[5, 6, 7]], 4)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = card_engine(tiny_llama, "bf16", blocks=4096)
    generate(engine, [[5, 6, 7]], 40)
    assert torch.cuda.memory_allocated() > before + (1 << 27)
    engine.destroy()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
