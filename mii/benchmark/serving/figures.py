"""From traces to figures.

Counted, not derived: requests and tokens a second are those that were complete, over the time from the first request
to the last end. Effective throughput is that of DeepSpeed-FastGen: a request counts when its first token came within
(tokens of the prompt / 512) seconds and the exponential moving average of its time per token never exceeded what the
agreed rate allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mii.benchmark.serving.trace import Trace

__all__ = ["RATES", "distribution", "figures", "meets_agreement", "worst_average"]

PROMPT_TOKENS_A_SECOND = 512
RATES = (2, 4, 6)
"""Tokens a second that a reader is promised, one agreement each."""
EMA_SPAN = 16
_PERCENTILES = (50, 90, 95, 99)
_SHOWN_MESSAGES = 5


def figures(traces: Sequence[Trace], clients: int | None = None) -> dict[str, Any]:
    """Everything that is said about one load, as JSON types; times in seconds.

    Args:
        traces: of its requests; at least one.
        clients: of a closed loop, for throughput by Little's law as DeepSpeed-FastGen's scripts have it.
    """
    done = [trace for trace in traces if not trace.kind]
    seconds = max(trace.ended for trace in traces) - min(trace.due for trace in traces)
    latency = distribution(trace.seconds for trace in done)
    prompt, answer = sum(trace.prompt_tokens for trace in done), sum(trace.tokens for trace in done)
    found = {
        "requests": len(traces),
        "completed": len(done),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "answer_tokens_per_s": answer / seconds,
        "tokens_per_s": (prompt + answer) / seconds,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "first_token_s": distribution(trace.first_seconds for trace in done),
        "token_s": distribution(trace.token_seconds for trace in done),
        "gap_s": distribution(gap for trace in done for gap in trace.gaps()),
        "request_s": latency,
        "effective": [_effective(traces, rate, seconds) for rate in RATES],
        "errors": _errors(traces),
    }
    if clients and latency:
        found["clients_over_latency_per_s"] = clients / latency["mean"]
    return found


def distribution(values: Iterable[float | None]) -> dict[str, float]:
    """Mean, percentiles and maximum of what is not None; empty where nothing is left."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return {}
    percentiles = np.percentile(known, _PERCENTILES)
    named = {f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(known.mean()), **named, "max": float(known.max())}


def meets_agreement(trace: Trace, rate: float) -> bool:
    """Whether a complete request came as fast as agreed.

    Args:
        trace: the request.
        rate: tokens a second.
    """
    first = trace.first_seconds
    if first is None or first > trace.prompt_tokens / PROMPT_TOKENS_A_SECOND:
        return False
    return worst_average(trace) <= 1 / rate


def worst_average(trace: Trace) -> float:
    """The largest value that the exponential moving average of the time per token took, in seconds; 0: one piece.

    The average weighs a token by (1 - 2 / 17) for each one after it, over the tokens seen so far (span 16 with
    adjusted weights, as DeepSpeed-FastGen's script has it). Of tokens that came together each took its share of the
    time since the piece before.
    """
    decay = 1 - 2 / (EMA_SPAN + 1)
    total = weight = worst = 0.0
    for gap, count in zip(trace.gaps(), trace.counts[1:], strict=True):
        for _ in range(count):
            total, weight = total * decay + gap / count, weight * decay + 1
            worst = max(worst, total / weight)
    return worst


def _effective(traces: Sequence[Trace], rate: float, seconds: float) -> dict[str, float]:
    good = sum(not trace.kind and meets_agreement(trace, rate) for trace in traces)
    return {"agreed_tokens_per_s": rate, "requests_per_s": good / seconds, "share": good / len(traces)}


def _errors(traces: Sequence[Trace]) -> dict[str, Any]:
    """How many of each kind, and the words of the first few."""
    kinds = Counter(trace.kind for trace in traces if trace.kind)
    messages = dict.fromkeys(f"{trace.kind}: {trace.message}" for trace in traces if trace.kind)
    return {"count": kinds.total(), "kinds": dict(kinds), "messages": list(messages)[:_SHOWN_MESSAGES]}
