"""``/metrics``: what the replicas and their load balancer count, and what this server counts of its own requests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.responses import Response

from mii.entrypoints.http.errors import ApiError
from mii.entrypoints.http.service import HttpService

__all__ = ["add_metrics", "deployment_metrics"]

_Replica: TypeAlias = tuple[str, Mapping[str, Any]]

# Name, what it is, and where it lies in what a replica says of itself.
_GAUGES = [
    ("mii_replica_ready", "Whether the replica takes calls", "ready"),
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
# The same of the load balancer.
_BALANCER_GAUGES = [
    ("mii_balancer_running_calls", "gRPC calls under way", "running_calls"),
    ("mii_balancer_held_calls", "gRPC calls that wait for a replica", "held_calls"),
    ("mii_replicas_ready", "Replicas that take calls", "replicas_ready"),
    ("mii_replicas", "Replicas of the deployment", "replicas"),
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
        page = generate_latest(_everyones(service.registry)) + _print(deployment_metrics(stats))
        return Response(page, media_type=CONTENT_TYPE_LATEST)


def _everyones(registry: CollectorRegistry) -> CollectorRegistry:
    """What all processes of this server count, where there are several (see `mii.launch.gateway`)."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return registry
    together = CollectorRegistry()
    MultiProcessCollector(together)
    return together


def deployment_metrics(stats: Mapping[str, Any] | None) -> Iterator[Metric]:
    """Metrics of a deployment.

    Args:
        stats: what its load balancer's `Stats` says; None: nothing.
    """
    yield GaugeMetricFamily("mii_up", "Whether the deployment answers", value=float(stats is not None))
    yield from _balancer_metrics((stats or {}).get("balancer") or {})
    replicas = [(str(replica.get("replica", index)), replica) for index, replica in enumerate(_replicas(stats or {}))]
    yield from _replica_metrics(replicas)


def _balancer_metrics(numbers: Mapping[str, Any]) -> Iterator[Metric]:
    for name, text, path in _BALANCER_GAUGES:
        if path in numbers:
            yield GaugeMetricFamily(name, text, value=numbers[path])
    if "retries" in numbers:
        yield CounterMetricFamily("mii_balancer_retries", "Calls sent to another replica", value=numbers["retries"])
    calls = CounterMetricFamily("mii_balancer_calls", "gRPC calls that ended", labels=["status"])
    for status, count in (numbers.get("calls") or {}).items():
        calls.add_metric([status], count)
    yield calls


def _replica_metrics(replicas: Sequence[_Replica]) -> Iterator[Metric]:
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


def _replicas(stats: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What each replica says of itself; a replica that is asked itself says it without the balancer's frame."""
    replicas: Sequence[Mapping[str, Any]] = stats.get("replicas", [stats] if stats else [])
    return replicas


def _family(family: Any, replicas: Iterable[_Replica], path: str) -> Metric:
    for replica, numbers in replicas:
        value: Any = numbers
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            family.add_metric([replica], value)
    result: Metric = family
    return result


def _usage(replicas: Iterable[_Replica]) -> Metric:
    usage = GaugeMetricFamily("mii_kv_usage", "Share of the KV cache that is in use", labels=["replica"])
    for replica, numbers in replicas:
        engine = numbers.get("engine") or {}
        if engine.get("num_blocks"):
            usage.add_metric([replica], 1 - engine.get("free_blocks", 0) / engine["num_blocks"])
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
