"""Every step falls in a bucket that is captured and not much larger than it; capturing touches nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from mii.engine import capture
from mii.engine.graphs import (
    Bucket,
    StepGraphs,
    all_buckets,
    graph_bucket,
    most_captured_tokens,
)
from mii.engine.startup import StartReport
from tests.oracle import generate, random_prompts, small_engine

SIZES = st.tuples(st.integers(1, 1024), st.integers(1, 8192)).filter(lambda pair: pair[0] <= pair[1])


@given(SIZES, st.data())
def test_every_step_has_a_bucket(sizes: tuple[int, int], data: st.DataObject) -> None:
    max_sequences, max_tokens = sizes
    buckets = set(all_buckets(max_sequences, max_tokens))
    sequences = data.draw(st.integers(1, max_sequences))
    decode = graph_bucket(Bucket(sequences, sequences, decodes=True), max_sequences, max_tokens)
    assert decode in buckets
    assert decode.decodes and decode.tokens == decode.sequences
    assert sequences <= decode.sequences <= max(8, 1.25 * sequences + 8)
    tokens = data.draw(st.integers(sequences, max_tokens))
    mixed = graph_bucket(Bucket(tokens, sequences), max_sequences, max_tokens)
    assert mixed in buckets
    assert not mixed.decodes
    assert tokens <= mixed.tokens <= 1.125 * tokens + 16
    assert sequences <= mixed.sequences <= max(64, 2 * sequences)


def test_decode_steps_come_first_and_the_count_stays_small() -> None:
    buckets = all_buckets(1024, 8192)
    decode = [bucket for bucket in buckets if bucket.decodes]
    assert buckets[: len(decode)] == decode == sorted(decode)
    assert len(all_buckets(1024, 1024)) < 250
    assert len(set(buckets)) == len(buckets) < 400


def test_a_large_model_hides_the_launches_of_large_steps() -> None:
    assert most_captured_tokens(8_000_000_000, 8192) == 1024
    assert 1024 < most_captured_tokens(1_200_000_000, 8192) < 8192
    assert most_captured_tokens(135_000_000, 8192) == 8192
    assert most_captured_tokens(135_000_000, 512) == 512


class Notes:
    """In the place of the graphs: runs what would be captured, and notes the buckets."""

    def __init__(self) -> None:
        self.buckets: list[tuple[object, ...]] = []

    def __len__(self) -> int:
        return len(self.buckets)

    def capture(self, bucket: tuple[object, ...], body: Callable[[], None]) -> None:
        body()
        self.buckets.append(bucket)


def test_all_steps_are_captured_and_touch_nothing(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompts = random_prompts(engine.vocab_size, [5, 40, 3])
    expected = generate(engine, prompts, 12)
    runner = engine.runner
    assert runner is not None
    notes = Notes()
    runner.graphs = cast(StepGraphs, notes)
    captured = capture.capture_steps(runner, seconds=60)
    runner.graphs = None
    assert [key[:-1] for key in notes.buckets] == all_buckets(runner.limits.max_sequences, runner.limits.max_tokens)
    assert (captured.graphs, captured.planned) == (len(notes), len(notes))
    assert generate(engine, prompts, 12) == expected  # the prefix cache still holds what it held
    assert engine.stats().prefix_hit_tokens > 0
    engine.destroy()


def test_when_the_time_is_up_the_rest_is_left(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    runner = engine.runner
    assert runner is not None
    runner.graphs = cast(StepGraphs, Notes())
    captured = capture.capture_steps(runner, seconds=-1)
    assert captured.graphs == 0 < captured.planned
    runner.graphs = None
    engine.destroy()


def test_a_start_says_where_its_time_went(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    assert engine.start_report is not None
    phases = engine.start_report.as_dict()
    assert {"weights", "buffers", "KV cache", "all"} <= phases.keys()
    assert all(seconds >= 0 for seconds in phases.values())
    engine.destroy()


def test_a_phase_that_fails_is_timed_too() -> None:
    report = StartReport()
    with contextlib.suppress(KeyError), report.phase("weights"):
        report.note("16 GB")
        raise KeyError
    name, seconds, words = report.phases[-1]
    assert (name, words) == ("weights", "16 GB")
    assert seconds > 0
    assert any(line.startswith("weights") and line.endswith("16 GB") for line in report.lines())


def test_a_pace_is_measured_on_the_model_and_changes_no_answer(tiny_llama: Path) -> None:
    plain, paced = small_engine(tiny_llama), small_engine(tiny_llama, optimize_for="latency")
    pace = paced.scheduler.limits.pace
    assert pace is not None
    assert pace.seconds == 4 * pace.costs.step > 0
    assert 0 < pace.costs.token < pace.costs.step
    prompts = random_prompts(plain.vocab_size, [5, 90, 33, 1, 60])
    assert generate(paced, prompts, 20) == generate(plain, prompts, 20)
    aimed = small_engine(tiny_llama, target_token_ms=60_000)
    assert aimed.scheduler.limits.pace is not None
    assert aimed.scheduler.limits.pace.seconds == 60
    for engine in (plain, paced, aimed):
        engine.destroy()
