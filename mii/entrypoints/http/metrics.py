"""What an HTTP server counts of its own requests, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from mii.entrypoints.http.backend import Piece

__all__ = ["Counts", "Measured", "Meter"]

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


class Counts:
    """Tokens of a request's prompts and answers, by what the pieces of the answers say.

    Args:
        pieces: to begin with.
    """

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.prompts: dict[int, int] = {}
        """Of the prompt of each answer, by the answer's index."""
        self.generated: dict[int, int] = {}
        """Of each answer so far."""
        self.add(pieces)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Takes in what has come."""
        for piece in pieces:
            index = piece.index
            if index not in self.prompts:
                self.prompts[index] = piece.prompt_tokens
            self.generated[index] = piece.generated_tokens


class Measured:
    """One request, from its beginning to `end`."""

    def __init__(self, meter: Meter, route: str) -> None:
        self._meter, self._route = meter, route
        self._started = time.monotonic()
        self._first = 0.0
        self.counts = Counts()
        """To be kept up to date by whoever has the answers."""
        meter.running.labels(route).inc()

    def begin(self) -> None:
        """The first of a stream has come."""
        self._first = time.monotonic()

    def end(self, status: int) -> None:
        """The request is over.

        Args:
            status: of HTTP, or what a stream that had begun ended with.
        """
        meter, route, now = self._meter, self._route, time.monotonic()
        generated = self.counts.generated.values()
        meter.running.labels(route).dec()
        meter.requests.labels(route, str(status)).inc()
        meter.prompt_tokens.labels(route).inc(sum(self.counts.prompts.values()))
        meter.generated_tokens.labels(route).inc(sum(generated))
        meter.whole.labels(route).observe(now - self._started)
        if self._first:
            meter.first_token.labels(route).observe(self._first - self._started)
            longest = max(generated, default=0)
            if longest > 1:
                meter.per_token.labels(route).observe((now - self._first) / (longest - 1))
