"""Every family gives transformers' logits and greedy tokens with each of its options, in float32 on the CPU.

A greedy answer is judged by one forward of transformers over prompt and answer: when each token is the best one after
those before it, transformers would have chosen the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mii.engine import Engine
from tests.families_table import FamiliesTable
from tests.oracle import Oracle, final_logits, generate, random_prompts, small_engine, tolerance
from tests.variants import Variant, all_variants

CHUNK = 32  # tokens of a step, and so the longest part of a prompt that is computed at once
LENGTHS = [1, 5, 16, 17, 40, 33, 100]


class Model(NamedTuple):
    variant: Variant
    oracle: Oracle
    engine: Engine


@pytest.fixture(scope="module", params=all_variants(), ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    variant: Variant = request.param
    folder = variant.make(tmp_path_factory.mktemp(variant.model_type))
    engine = small_engine(folder, max_tokens=CHUNK)
    yield Model(variant, variant.oracle(folder), engine)
    engine.destroy()


def assert_greedy(oracle: Oracle, prompt: list[int], answer: list[int]) -> None:
    assert oracle.logits_along(prompt, answer).argmax(1).tolist() == answer


def test_64_greedy_tokens_of_a_mixed_batch_equal_transformers(model: Model) -> None:
    prompts = random_prompts(model.engine.vocab_size, LENGTHS)
    for prompt, answer in zip(prompts, generate(model.engine, prompts, 64), strict=True):
        assert len(answer) == 64
        assert_greedy(model.oracle, prompt, answer)


def test_logits_equal_transformers(model: Model, families_table: FamiliesTable) -> None:
    worst = 0.0
    for prompt in random_prompts(model.engine.vocab_size, LENGTHS, seed=1):
        expected = model.oracle.logits(prompt)
        error = (final_logits(model.engine, prompt, CHUNK) - expected).abs().max()
        assert error <= tolerance(expected, "fp32")
        worst = max(worst, float(error / expected.abs().max()))
    families_table.record(model.variant.family, model.variant.option, "fp32 on a CPU", f"{worst:.1e}")


def test_a_reused_prefix_changes_nothing(model: Model) -> None:
    first, second = random_prompts(model.engine.vocab_size, [60, 9], seed=2)
    generate(model.engine, [first], 2)
    before = model.engine.stats().prefix_hit_tokens
    prompts = [first + second, first[:37] + second, first]
    for prompt, answer in zip(prompts, generate(model.engine, prompts, 16), strict=True):
        assert_greedy(model.oracle, prompt, answer)
    assert model.engine.stats().prefix_hit_tokens - before >= 48 + 32 + 48


LAST = {variant.family: variant for variant in all_variants()}


@pytest.mark.parametrize("variant", LAST.values(), ids=str)
def test_answers_that_memory_interrupts_are_those_that_they_would_have_been(variant: Variant, tmp_path: Path) -> None:
    oracle, engine = variant.oracle(variant.make(tmp_path)), small_engine(tmp_path, max_tokens=24, blocks=16)
    first, *others = random_prompts(engine.vocab_size, [50, 21, 33, 90], seed=3)
    prompts = [first, first[:40] + others[0], *others[1:]]
    for prompt, answer in zip(prompts, generate(engine, prompts, 48), strict=True):
        assert len(answer) == 48
        assert_greedy(oracle, prompt, answer)
    assert engine.stats().preemptions > 0
    engine.destroy()


def test_the_largest_error_that_is_allowed_is_small_against_what_logits_differ_by(model: Model) -> None:
    """Were all logits alike, the comparisons above could not fail."""
    logits = model.oracle.logits(random_prompts(model.engine.vocab_size, [17])[0])
    best = torch.topk(logits, 2).values
    assert best[0] - best[1] > tolerance(logits, "fp32")
    assert logits.std() > 100 * tolerance(logits, "fp32")
