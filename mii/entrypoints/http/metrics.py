"""What an HTTP server counts of its own requests, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from mii.entrypoints.http.backend import Piece

__all__ = ["Measured", "Meter"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


disable_created_metrics()  # a time stamp for each series, which nobody reads


class Meter:
    """Counters of one server, by route.

    Args:
        registry: where they are found by whoever prints them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        route = ["route"]
        self.requests = Counter("mii_http_requests", "HTTP requests that ended", ["route", "status"], registry=registry)
        self.running = Gauge(
            "mii_http_requests_running",
            "HTTP requests under way",
            route,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.prompt_tokens = Counter("mii_http_prompt_tokens", "Tokens of prompts", route, registry=registry)
        self.generated_tokens = Counter("mii_http_generated_tokens", "Tokens generated", route, registry=registry)
        self.first_token = Histogram(
            "mii_http_time_to_first_token_seconds",
            "From a request to the first token of its stream",
            route,
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "mii_http_time_per_output_token_seconds",
            "Mean time of a stream's tokens after the first",
            route,
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "mii_http_request_seconds", "From a request to its end", route, buckets=_SECONDS, registry=registry
        )

    def begin(self, route: str) -> Measured:
        """A request has come."""
        return Measured(self, route)


class Measured:
    """One request, from its beginning to `end`."""

    def __init__(self, meter: Meter, route: str) -> None:
        self._meter, self._route = meter, route
        self._started = time.monotonic()
        self._first = 0.0
        self._prompts: dict[int, int] = {}
        self._generated: dict[int, int] = {}
        meter.running.labels(route).inc()

    def add(self, pieces: Sequence[Piece]) -> None:
        """Counts what has come of a stream."""
        if not self._first:
            self._first = time.monotonic()
        self.add_answers(pieces)

    def add_answers(self, pieces: Sequence[Piece]) -> None:
        """Counts what has come all at once."""
        for piece in pieces:
            self._prompts[piece.index] = piece.prompt_tokens
            self._generated[piece.index] = piece.generated_tokens

    def end(self, status: int) -> None:
        """The request is over.

        Args:
            status: of HTTP, or what a stream that had begun ended with.
        """
        meter, route, now = self._meter, self._route, time.monotonic()
        generated = sum(self._generated.values())
        meter.running.labels(route).dec()
        meter.requests.labels(route, str(status)).inc()
        meter.prompt_tokens.labels(route).inc(sum(self._prompts.values()))
        meter.generated_tokens.labels(route).inc(generated)
        meter.whole.labels(route).observe(now - self._started)
        if self._first:
            meter.first_token.labels(route).observe(self._first - self._started)
            longest = max(self._generated.values(), default=0)
            if longest > 1:
                meter.per_token.labels(route).observe((now - self._first) / (longest - 1))
