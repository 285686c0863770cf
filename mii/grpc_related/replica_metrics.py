"""What a replica counts, for the Stats call: plain numbers that a gateway turns into metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from typing import Any

from mii.grpc_related.generation import Timing

__all__ = ["Histogram", "ReplicaMetrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_RECENT = 64


class Histogram:
    """Counts of values by upper bound, as Prometheus has them (not cumulated; the last count is of all above).

    Args:
        bounds: ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def numbers(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum, "count": sum(self.counts)}


class ReplicaMetrics:
    """Counters since the front came up. `calls` counts RPCs by the name of their status; the rest counts prompts."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.engine_losses = 0
        self.first_token_seconds = Histogram(_SECONDS)
        self.token_seconds = Histogram(_TOKEN_SECONDS)
        self.request_seconds = Histogram(_SECONDS)
        self._ends: deque[float] = deque(maxlen=_RECENT)

    def end(self, timing: Timing, tokens: int, reason: str, now: float) -> None:
        """A prompt's answer has ended: after how many tokens and why ("stop", "length", "error", "cancelled")."""
        self.finished[reason] += 1
        self._ends.append(now)
        if timing.first:
            self.first_token_seconds.add(timing.first - timing.started)
        if tokens > 1:
            self.token_seconds.add((timing.last - timing.first) / (tokens - 1))
        if reason in ("stop", "length"):
            self.request_seconds.add(now - timing.started)

    def ends_a_second(self, now: float) -> float:
        """How many answers end in a second, by the last few; 0.0: not known."""
        if len(self._ends) < 2:
            return 0.0
        return len(self._ends) / max(now - self._ends[0], 1e-3)

    def numbers(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "calls": dict(self.calls),
            "finished": dict(self.finished),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "engine_losses": self.engine_losses,
            "first_token_seconds": self.first_token_seconds.numbers(),
            "token_seconds": self.token_seconds.numbers(),
            "request_seconds": self.request_seconds.numbers(),
        }
