"""LongRoPE on a card: answers cross the trained length while steps overlap, launched, captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.oracle import Oracle, generate, random_prompts, small_engine
from tests.variants.phi3 import PHI, TRAINED, long_rope


def test_answers_that_cross_the_trained_length_equal_transformers(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("phi3", **PHI, **long_rope(64))
    oracle = Oracle(folder, "fp32", "cuda")
    engine = small_engine(folder, device="cuda", dtype="fp32", block_size=64)
    prompts = random_prompts(200, [3, 50, TRAINED - 1, TRAINED, TRAINED + 1, 90])
    # Some versions of transformers keep keys of the short rotation in their cache when an answer crosses the length.
    expected = [oracle.greedy(prompt, 40, use_cache=False) for prompt in prompts]
    for _ in range(3):
        assert generate(engine, prompts, 40) == expected
    assert engine.stats().free_blocks == engine.num_blocks
    engine.destroy()
