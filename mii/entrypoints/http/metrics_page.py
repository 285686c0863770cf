"""``/metrics``: what the replicas and their load balancer count, and what this server counts of its own requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.responses import Response

from mii.entrypoints.http.errors import ApiError
from mii.entrypoints.http.service import HttpService

__all__ = ["add_metrics", "deployment_metrics"]

# Name, what it is, and where it lies in what a replica says of itself.
_GAUGES = [
    ("mii_requests_outstanding", "Prompts that are running or waiting", "outstanding"),
    ("mii_queue_size", "Prompts that may be running or waiting", "queue_size"),
    ("mii_requests_running", "Prompts that the engine works on", "engine.running"),
    ("mii_requests_waiting", "Prompts that wait for the engine", "engine.waiting"),
    ("mii_kv_blocks", "Blocks of the KV cache", "engine.num_blocks"),
    ("mii_kv_blocks_free", "Blocks of the KV cache that nobody uses", "engine.free_blocks"),
]
_COUNTERS = [
    ("mii_prompt_tokens", "Tokens of prompts", "prompt_tokens"),
    ("mii_generated_tokens", "Tokens generated", "generated_tokens"),
    ("mii_preemptions", "Prompts put back into the queue for want of KV blocks", "engine.preemptions"),
    ("mii_prefix_hit_tokens", "Prompt tokens found in the KV cache", "engine.prefix_hit_tokens"),
    ("mii_prefix_queried_tokens", "Prompt tokens looked for in the KV cache", "engine.prefix_queried_tokens"),
    ("mii_engine_steps", "Steps of the engine", "engine.steps"),
    ("mii_engine_losses", "Times that the engine was lost", "engine_losses"),
]
_BY_WORD = [
    ("mii_requests", "Prompts whose answers ended", "reason", "finished"),
    ("mii_calls", "gRPC calls that ended", "status", "calls"),
]
_HISTOGRAMS = [
    ("mii_time_to_first_token_seconds", "From a prompt's arrival to its first token", "first_token_seconds"),
    ("mii_time_per_output_token_seconds", "Mean time of an answer's tokens after the first", "token_seconds"),
    ("mii_request_seconds", "From a prompt's arrival to its answer's end", "request_seconds"),
]


def add_metrics(app: FastAPI, service: HttpService) -> None:
    """Adds ``/metrics``. It answers also where the deployment does not, and says so with ``mii_up`` 0."""

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            stats: Mapping[str, Any] | None = await service.backend.stats()
        except ApiError:
            stats = None
        page = generate_latest(service.registry) + _print(deployment_metrics(stats))
        return Response(page, media_type=CONTENT_TYPE_LATEST)


def deployment_metrics(stats: Mapping[str, Any] | None) -> Iterator[Metric]:
    """Metrics of a deployment.

    Args:
        stats: what its load balancer's `Stats` says; None: nothing.
    """
    yield GaugeMetricFamily("mii_up", "Whether the deployment answers", value=float(stats is not None))
    replicas = list(_replicas(stats or {}))
    for name, text, path in _GAUGES:
        yield _family(GaugeMetricFamily(name, text, labels=["replica"]), replicas, path)
    yield _usage(replicas)
    for name, text, path in _COUNTERS:
        yield _family(CounterMetricFamily(name, text, labels=["replica"]), replicas, path)
    for name, text, label, path in _BY_WORD:
        counter = CounterMetricFamily(name, text, labels=["replica", label])
        for replica, numbers in replicas:
            for word, count in (numbers.get(path) or {}).items():
                counter.add_metric([replica, word], count)
        yield counter
    for name, text, path in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text, labels=["replica"])
        for replica, numbers in replicas:
            if path in numbers:
                histogram.add_metric([replica], list(_buckets(numbers[path])), numbers[path]["sum"])
        yield histogram


def _replicas(stats: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each replica's number and what it says of itself; one that says nothing is left out."""
    for index, replica in enumerate(stats.get("replicas", [stats] if stats else [])):
        if isinstance(replica, Mapping) and "engine" in replica:
            yield str(index), replica


def _family(family: Any, replicas: Iterable[tuple[str, Mapping[str, Any]]], path: str) -> Metric:
    for replica, numbers in replicas:
        value: Any = numbers
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            family.add_metric([replica], value)
    result: Metric = family
    return result


def _usage(replicas: Iterable[tuple[str, Mapping[str, Any]]]) -> Metric:
    usage = GaugeMetricFamily("mii_kv_usage", "Share of the KV cache that is in use", labels=["replica"])
    for replica, numbers in replicas:
        blocks = numbers["engine"].get("num_blocks")
        if blocks:
            usage.add_metric([replica], 1 - numbers["engine"].get("free_blocks", 0) / blocks)
    return usage


def _buckets(numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """As Prometheus has them: of each upper bound how many values are not above it."""
    bounds = [*(repr(float(bound)) for bound in numbers["bounds"]), "+Inf"]
    return zip(bounds, accumulate(numbers["counts"]), strict=True)


def _print(families: Iterable[Metric]) -> bytes:
    found = list(families)

    class _Page:
        def collect(self) -> Iterable[Metric]:
            return found

    registry = CollectorRegistry()
    registry.register(_Page())
    return generate_latest(registry)
