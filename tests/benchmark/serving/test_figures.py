"""Figures from traces that were made up, against what can be worked out by hand or in another way."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mii.benchmark.serving.figures import distribution, figures, meets_agreement, worst_average
from mii.benchmark.serving.trace import Trace, share_out


def trace_of(times: list[float], counts: list[int] | None = None, *, prompt: int = 512, due: float = 0.0) -> Trace:
    counts = [1] * len(times) if counts is None else counts
    trace = Trace(due, sum(counts), prompt, sent=due, ended=times[-1] if times else due, times=[], counts=[])
    for now, count in zip(times, counts, strict=True):
        trace.add(now, count)
    return trace


def averages_by_definition(gaps: list[float], span: int = 16) -> list[float]:
    """The moving average at each token as a sum over all tokens before it."""
    decay = 1 - 2 / (span + 1)
    found = []
    for end in range(1, len(gaps) + 1):
        weights = decay ** np.arange(end - 1, -1, -1)
        found.append(float(np.dot(weights, gaps[:end]) / weights.sum()))
    return found


def test_the_worst_average_is_that_of_the_definition() -> None:
    rng = random.Random(1)
    gaps = [rng.expovariate(10) for _ in range(60)]
    times = np.cumsum([0.5, *gaps]).tolist()
    assert worst_average(trace_of(times)) == pytest.approx(max(averages_by_definition(gaps)))


def test_tokens_of_one_piece_share_the_time_since_the_piece_before() -> None:
    assert worst_average(trace_of([1.0, 2.0, 2.5], [3, 4, 1])) == pytest.approx(
        max(averages_by_definition([0.25] * 4 + [0.5]))
    )
    assert worst_average(trace_of([1.0], [7])) == 0.0


def test_an_agreement_holds_up_to_its_bounds() -> None:
    assert meets_agreement(trace_of([1.0, 1.5, 2.0]), 2)  # 512 tokens of prompt in a second, then two tokens a second
    assert not meets_agreement(trace_of([1.01, 1.5, 2.0]), 2)
    assert not meets_agreement(trace_of([1.0, 1.51]), 2)
    assert meets_agreement(trace_of([11.0], due=10.0), 6)
    assert not meets_agreement(trace_of([]), 2)


def test_a_pause_breaks_the_agreement_though_the_mean_would_not() -> None:
    steady = trace_of([0.1 * step for step in range(1, 101)])
    paused = trace_of([0.1 * step + (5.0 if step > 50 else 0.0) for step in range(1, 101)])
    assert paused.token_seconds is not None and paused.token_seconds < 1 / 4
    assert meets_agreement(steady, 4) and not meets_agreement(paused, 4)


def test_figures_count_what_was_complete() -> None:
    fast, slow = trace_of([1.0, 1.1, 1.2], prompt=600), trace_of([2.0, 3.0, 4.0], prompt=600)
    lost = trace_of([1.0], prompt=600)
    lost.kind, lost.message, lost.ended = "UNAVAILABLE", "gone", 5.0
    found = figures([fast, slow, lost], clients=2)
    assert (found["requests"], found["completed"], found["seconds"]) == (3, 2, 5.0)
    assert found["requests_per_s"] == pytest.approx(2 / 5)
    assert found["answer_tokens_per_s"] == pytest.approx(6 / 5)
    assert found["tokens_per_s"] == pytest.approx(1206 / 5)
    assert found["first_token_s"]["mean"] == pytest.approx(1.5)
    assert found["token_s"]["p50"] == pytest.approx(0.55)
    assert found["request_s"]["max"] == pytest.approx(4.0)
    assert found["clients_over_latency_per_s"] == pytest.approx(2 / 2.6)
    assert [agreed["share"] for agreed in found["effective"]] == [pytest.approx(1 / 3)] * 3
    assert found["errors"] == {"count": 1, "kinds": {"UNAVAILABLE": 1}, "messages": ["UNAVAILABLE: gone"]}


def test_nothing_complete_is_no_figure_and_no_mistake() -> None:
    lost = trace_of([])
    lost.kind, lost.ended = "timeout", 1.0
    found = figures([lost])
    assert found["first_token_s"] == found["token_s"] == found["request_s"] == {}
    assert found["requests_per_s"] == 0 and found["errors"]["kinds"] == {"timeout": 1}


def test_percentiles() -> None:
    found = distribution([float(value) for value in range(101)] + [None])
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}


@pytest.mark.parametrize(("total", "weights"), [(7, [1, 1, 1]), (3, [10, 20, 30, 40]), (0, [5]), (9, []), (9, [0, 0])])
def test_shares_add_up(total: int, weights: list[int]) -> None:
    shares = share_out(total, weights)
    assert len(shares) == len(weights) and min(shares, default=0) >= 0
    assert sum(shares) == (total if sum(weights) else 0)
