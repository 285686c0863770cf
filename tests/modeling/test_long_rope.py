"""LongRoPE: contexts that grow past the trained length give what transformers gives, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mii.engine import Engine
from tests.oracle import Oracle, final_logits, generate, random_prompts, small_engine, tolerance
from tests.variants.phi3 import PHI, TRAINED, long_rope


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("phi3", **PHI, **long_rope(64))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return small_engine(folder)


@pytest.mark.parametrize("length", [TRAINED - 30, TRAINED - 1, TRAINED, TRAINED + 1])
def test_an_answer_that_crosses_the_trained_length_equals_transformers(
    folder: Path, engine: Engine, length: int
) -> None:
    prompt = random_prompts(200, [length])[0]
    assert generate(engine, [prompt], 40)[0] == Oracle(folder).greedy(prompt, 40)


def test_answers_that_cross_together_with_others_are_what_they_are_alone(folder: Path, engine: Engine) -> None:
    prompts = random_prompts(200, [3, 60, 69, 70, 71, 72, 73, 90])
    alone = [generate(small_engine(folder), [prompt], 30)[0] for prompt in prompts]
    assert generate(engine, prompts, 30) == alone
    tight = small_engine(folder, blocks=14)
    assert generate(tight, prompts, 30) == alone
    assert tight.stats().preemptions > 0


def test_short_and_long_contexts_share_no_blocks(engine: Engine) -> None:
    prompt = random_prompts(200, [TRAINED + 20], seed=5)[0]
    before = engine.stats().prefix_hit_tokens
    generate(engine, [prompt[: TRAINED - 8]], 1)
    generate(engine, [prompt], 1)
    assert engine.stats().prefix_hit_tokens == before
    generate(engine, [prompt], 1)
    assert engine.stats().prefix_hit_tokens == before + (TRAINED + 19) // 16 * 16


def test_a_sequence_put_in_pieces_is_computed_anew_where_it_crosses(folder: Path, engine: Engine) -> None:
    prompt = random_prompts(200, [TRAINED + 5], seed=6)[0]
    expected = Oracle(folder).logits(prompt)
    assert (final_logits(engine, prompt, 20) - expected).abs().max() <= tolerance(expected, "fp32")
    assert engine.free_blocks == engine.num_blocks


def test_no_switch_where_contexts_cannot_get_that_long(folder: Path) -> None:
    short = small_engine(folder, max_length=TRAINED)
    assert short.runner is not None
    assert short.runner.rotation.switch == 0
    prompt = random_prompts(200, [30])[0]
    assert generate(short, [prompt], 20)[0] == Oracle(folder).greedy(prompt, 20)
