"""The engine on a card: the same tokens in any batch, with and without graphs, and the memory given back.

That they are transformers' tokens is tested for every family in test_families.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.engine import Engine
from mii.ops import native
from tests.oracle import Oracle, assert_greedy_but_for_ties, generate, random_prompts, small_engine

LENGTHS = [1, 5, 16, 17, 40, 33, 100]


def card_engine(folder: Path, dtype: str, **options: Any) -> Engine:
    return small_engine(folder, device="cuda", dtype=dtype, **{"block_size": 64, **options})


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
        assert_greedy_but_for_ties(oracle, prompt, answer, "bf16")


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


def test_heads_that_no_kernel_takes_are_computed_by_torch_without_graphs(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint(head_dim=544, num_attention_heads=2, num_key_value_heads=1)
    engine, oracle = card_engine(folder, "bf16"), Oracle(folder, "bf16", "cuda")
    before = native.fallbacks
    prompts = random_prompts(engine.vocab_size, [5, 40])
    for _ in range(3):
        for prompt, answer in zip(prompts, generate(engine, prompts, 12), strict=True):
            assert_greedy_but_for_ties(oracle, prompt, answer, "bf16")
    assert native.fallbacks > before
    assert engine.runner is not None
    assert not engine.runner.graphs


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
