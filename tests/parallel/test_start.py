"""What ranks measure for themselves when they start, and must agree on: rank 0's clock counts on all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mii.batching.pace import StepCosts
from mii.engine import capture, loading, pacing
from mii.engine.graphs import Bucket, StepGraphs, all_buckets
from mii.engine.runner import Runner
from mii.errors import GenerationError
from mii.ops.all_reduce import of_first
from mii.ops.shard_sampler import Draws
from tests.engine.test_graphs import Notes
from tests.oracle import generate, random_prompts, small_engine
from tests.parallel.test_sharded_models import NINE_HEADS
from tests.parallel.threads import on_ranks, ranked_engine

LENGTHS = [3, 90, 60, 5, 75]


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(**NINE_HEADS)


def expected(model: Path) -> list[list[int]]:
    engine = small_engine(model)
    answers = generate(engine, random_prompts(engine.vocab_size, LENGTHS), 16)
    engine.destroy()
    return answers


def rank_of(runner: Runner) -> int:
    assert runner.model.place.group is not None
    return runner.model.place.group.rank


def test_numbers_of_rank_0_come_to_all_bit_for_bit() -> None:
    numbers = [0.1 + 1e-17, 1 / 3, 2.5e-9]
    found = on_ranks(
        3, lambda group: of_first(group, [each * (1 + group.rank) for each in numbers], torch.device("cpu"))
    )
    assert found == [numbers] * 3
    assert of_first(None, numbers, torch.device("cpu")) == numbers


@pytest.fixture
def uneven_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would come to other costs: by its own clock rank 1 is four times as slow as rank 0."""

    def seconds(runner: Runner, bucket: Bucket, rounds: int) -> float:
        runner.rehearse(bucket)
        return (5e-3 if bucket.decodes else 1e-3 * bucket.tokens) * 4 ** rank_of(runner)

    monkeypatch.setattr(pacing, "_seconds", seconds)


@pytest.mark.usefixtures("uneven_clocks")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_keep_one_pace_though_their_clocks_differ(model: Path, size: int) -> None:
    with ranked_engine(model, size, target_token_ms=30) as first:
        pace = first.engine.scheduler.limits.pace
        assert pace is not None
        assert (pace.seconds, pace.costs.step, pace.costs.token) == (0.03, 5e-3, 1e-3)
        prompts, steps = random_prompts(first.vocab_size, LENGTHS), 0
        step = first.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            return step()

        first.step = counted  # type: ignore[method-assign]
        assert generate(first, prompts, 16) == expected(model)  # type: ignore[arg-type]
    assert steps > 16 + 5  # 230 tokens of prompts, at most 30 with each token of the first answer


@pytest.mark.usefixtures("uneven_clocks")
def test_ranks_that_each_went_by_their_own_clock_would_come_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "of_first", lambda group, numbers, device: list(numbers))
    with (
        ranked_engine(model, 2, target_token_ms=30) as first,
        pytest.raises(GenerationError, match="planned another step"),
    ):
        generate(first, random_prompts(first.vocab_size, LENGTHS), 16)  # type: ignore[arg-type]


def test_real_clocks_do_as_well(model: Path) -> None:
    with ranked_engine(model, 2, optimize_for="latency") as first:
        pace = first.engine.scheduler.limits.pace
        assert pace is not None
        assert isinstance(pace.costs, StepCosts)
        assert pace.seconds == 4 * pace.costs.step > 0
        assert generate(first, random_prompts(first.vocab_size, LENGTHS), 16) == expected(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_capture_the_same_steps_until_the_first_ones_time_is_up(
    model: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With notes in the place of graphs, and clocks of which each is faster than the one before."""
    right = expected(model)
    captured: dict[int, list[tuple[object, ...]]] = {}
    clock = threading.local()
    make_cache = loading._make_cache

    def tick() -> float:
        clock.now = getattr(clock, "now", 0.0) + 0.1 * 5 ** getattr(clock, "rank", 0)
        return clock.now

    def with_notes(config: Any, runner: Runner, *rest: Any) -> None:
        clock.rank = rank_of(runner)
        runner.graphs = cast(StepGraphs, Notes())
        make_cache(config, runner, *rest)
        captured[clock.rank] = cast(Notes, runner.graphs).buckets
        runner.graphs = None

    monkeypatch.setattr(loading, "AMONG_RANKS", True)
    monkeypatch.setattr(loading, "CAPTURE_SECONDS", 1.05)
    monkeypatch.setattr(loading, "_make_cache", with_notes)
    monkeypatch.setattr(capture, "StepGraphs", lambda device: Notes())
    monkeypatch.setattr(capture, "time", SimpleNamespace(monotonic=tick))
    with ranked_engine(model, size) as first:
        answers = generate(first, random_prompts(first.vocab_size, LENGTHS), 16)  # type: ignore[arg-type]
        limits = first.runner.limits
    planned = all_buckets(limits.max_sequences, limits.max_tokens)
    assert sorted(captured) == list(range(size))
    assert all(buckets == captured[0] for buckets in captured.values())
    kinds = [Draws(), Draws(random=True, top_p=True)]
    assert captured[0] == [(*bucket, draws) for bucket in planned[:5] for draws in kinds]
    assert answers == right
