"""Whatever is asked for is scheduled: any number, any length, however small the cache; nothing is lost or left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii.batching.data_classes import EngineRequest
from mii.errors import PromptTooLongError
from tests.oracle import random_prompts, small_engine

BLOCK = 16


def ask(engine_options: dict[str, int], lengths: list[tuple[int, int]], folder: Path) -> None:
    """Runs requests of (prompt, answer) tokens, all given at once, and checks that each gets its full length."""
    engine = small_engine(folder, block_size=BLOCK, **engine_options)
    prompts = random_prompts(engine.vocab_size, [prompt for prompt, _ in lengths])
    for uid, (prompt, (_, answer)) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add_request(EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=answer))
    counts = [0] * len(lengths)
    reasons: list[str | None] = [None] * len(lengths)
    while engine.has_work:
        for output in engine.step():
            counts[output.uid] += len(output.token_ids)
            reasons[output.uid] = output.finish_reason
    assert counts == [min(answer, engine.capacity - prompt) for prompt, answer in lengths]
    assert set(reasons) == {"length"}
    assert engine.free_blocks == engine.num_blocks
    engine.destroy()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_cache_of_hardly_any_blocks_serves_what_fits(blocks: int, tiny_llama: Path) -> None:
    full = blocks * BLOCK
    ask({"blocks": blocks}, [(1, 1), (full - 1, 5), (1, full + 9), (full // 2, full)], tiny_llama)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 31, 32, 33, 64])
def test_prompts_around_blocks_and_steps(length: int, tiny_llama: Path) -> None:
    ask({"blocks": 12, "max_tokens": 32}, [(length, 1), (length, 2), (length, BLOCK), (length, BLOCK + 1)], tiny_llama)


def test_many_more_requests_than_slots_sequences_or_blocks(tiny_llama: Path) -> None:
    lengths = [(1 + uid % 23, 1 + uid % 5) for uid in range(150)]
    ask({"blocks": 5, "max_tokens": 8, "max_sequences": 4}, lengths, tiny_llama)


def test_steps_of_one_token(tiny_llama: Path) -> None:
    ask({"blocks": 6, "max_tokens": 1, "max_sequences": 1}, [(5, 3), (1, 1), (17, 2)], tiny_llama)


def test_long_ones_beside_short_ones_in_a_cache_for_neither_all(tiny_llama: Path) -> None:
    ask({"blocks": 10}, [(100, 50), (1, 90), (90, 60), (3, 3), (120, 30), (1, 1)], tiny_llama)


def test_only_what_can_never_fit_is_refused_and_the_others_run(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, block_size=BLOCK, blocks=2)
    with pytest.raises(PromptTooLongError, match="whole KV cache holds 32"):
        engine.add_request(EngineRequest(uid=0, prompt_ids=[5] * 32, max_new_tokens=1))
    engine.add_request(EngineRequest(uid=1, prompt_ids=[5] * 31, max_new_tokens=1))
    assert sum(len(output.token_ids) for output in engine.step()) == 1
    engine.destroy()
