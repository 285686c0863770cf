"""The put / query / can_schedule / flush surface of DeepSpeed's ragged engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mii.engine.ragged import SchedulingError, SchedulingResult
from mii.errors import RequestError
from tests.oracle import Oracle, generate, random_prompts, small_engine


def test_put_in_chunks_gives_the_logits_of_the_whole(tiny_llama: Path) -> None:
    engine, oracle = small_engine(tiny_llama), Oracle(tiny_llama)
    first, second = random_prompts(engine.vocab_size, [40, 11])
    engine.put([5], [first[:20]])
    both = engine.put([8, 5], [torch.tensor(second), first[20:]])
    for got, prompt in zip(both, (second, first), strict=True):
        expected = oracle.logits(prompt)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_greedy_decoding_by_hand_equals_the_engine(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [10])[0]
    expected = generate(engine, [prompt], 10)[0]
    tokens = [int(engine.put([1], [prompt])[0].argmax())]
    while len(tokens) < 10:
        tokens.append(int(engine.put([1], [tokens[-1:]])[0].argmax()))
    assert tokens == expected
    engine.flush(1)
    assert engine.free_blocks == engine.num_blocks


def test_query_says_what_fits(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    assert engine.query(1, 40, 2) == (32, 2)
    assert engine.query(1, 5, 2) == (5, 1)
    engine.put([1], [[5] * 20])
    assert engine.get_remaining_block_capacity(1) == 12
    assert engine.query(1, 12, 0) == (12, 0)
    assert engine.query(1, 13, 1) == (13, 1)
    assert engine.get_remaining_block_capacity(99) == 0


def test_can_schedule_names_the_limit_that_is_exceeded(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, blocks=3, max_sequences=4)
    assert engine.can_schedule([1, 2], [16, 16]) is SchedulingResult.Success
    assert engine.can_schedule([1], [33]) is SchedulingResult.BatchTokenLimitExceeded
    assert engine.can_schedule(range(5), [1] * 5) is SchedulingResult.BatchSequenceLimitExceeded
    assert engine.can_schedule(range(65), [1] * 65) is SchedulingResult.EngineSequenceLimitExceeded
    assert engine.can_schedule([1, 2, 3, 4], [8] * 4) is SchedulingResult.KVCacheLimitExceeded
    assert engine.can_schedule([1], [513]) is SchedulingResult.SequenceTokenLimitExceeded
    with pytest.raises(SchedulingError, match="KVCacheLimitExceeded"):
        engine.put([1, 2, 3, 4], [[5] * 8] * 4)
    assert engine.free_blocks == 3


def test_bad_input_to_put_is_refused(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    with pytest.raises(RequestError, match="each uid once"):
        engine.put([1, 1], [[5], [6]])
    with pytest.raises(RequestError, match="at least one"):
        engine.put([1], [[]])
    with pytest.raises(RequestError, match=r"in 0\.\.260"):
        engine.put([1], [[300]])
    engine.flush(1)
    assert engine.free_blocks == engine.num_blocks
