"""``/metrics``: what the deployment and the HTTP server count, in Prometheus's own parser's eyes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mii.entrypoints.http.metrics_page import deployment_metrics
from mii.grpc_related.restful_gateway import create_app
from tests.serving.fake_backend import STATS, HttpFixture, serving

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def gateway() -> Iterator[HttpFixture]:
    with serving(create_app) as fixture:
        yield fixture


def read(gateway: HttpFixture) -> Samples:
    response = gateway.http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_each_replica_has_its_own_numbers(gateway: HttpFixture) -> None:
    samples = read(gateway)
    assert value(samples, "mii_up") == 1
    assert [value(samples, "mii_requests_outstanding", replica=str(index)) for index in range(2)] == [4, 5]
    expected = {
        "mii_replica_ready": 1,
        "mii_requests_running": 3,
        "mii_requests_waiting": 1,
        "mii_queue_size": 64,
        "mii_kv_blocks": 100,
        "mii_kv_blocks_free": 25,
        "mii_kv_usage": 0.75,
        "mii_prompt_tokens_total": 50,
        "mii_generated_tokens_total": 60,
        "mii_preemptions_total": 2,
        "mii_prefix_hit_tokens_total": 7,
        "mii_prefix_queried_tokens_total": 9,
        "mii_engine_steps_total": 11,
        "mii_engine_losses_total": 0,
    }
    assert {name: value(samples, name, replica="1") for name in expected} == expected
    assert value(samples, "mii_requests_total", replica="0", reason="stop") == 4
    assert value(samples, "mii_calls_total", replica="0", status="CANCELLED") == 1


def test_histograms_are_cumulative(gateway: HttpFixture) -> None:
    samples = read(gateway)
    name = "mii_time_to_first_token_seconds"
    buckets = [value(samples, f"{name}_bucket", replica="0", le=bound) for bound in ("0.1", "1.0", "+Inf")]
    assert buckets == [3, 4, 5]
    assert (value(samples, f"{name}_count", replica="0"), value(samples, f"{name}_sum", replica="0")) == (5, 4.5)
    assert value(samples, "mii_time_per_output_token_seconds_count", replica="0") == 1
    assert value(samples, "mii_request_seconds_count", replica="0") == 2


def test_the_load_balancer_is_counted_too(gateway: HttpFixture) -> None:
    samples = read(gateway)
    assert value(samples, "mii_balancer_calls_total", status="OK") == 3
    assert value(samples, "mii_balancer_retries_total") == 1
    assert value(samples, "mii_replicas") == 2


def test_requests_are_counted_by_route_and_status(gateway: HttpFixture) -> None:
    before = read(gateway)
    for prompts, stream in (("a b", False), ("a", True), ("!busy", False), ("!busy", True)):
        gateway.http.post("/mii/a%20b/c", json={"prompts": prompts, "stream": stream, "max_new_tokens": 4})
    gateway.http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"], "max_tokens": 2, "stream": True})
    after = read(gateway)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - before.get((name, frozenset(labels.items())), 0.0)

    assert grown("mii_http_requests_total", route="/mii", status="200") == 2
    assert grown("mii_http_requests_total", route="/mii", status="429") == 2
    assert grown("mii_http_prompt_tokens_total", route="/mii") == 3
    assert grown("mii_http_generated_tokens_total", route="/mii") == 8
    assert grown("mii_http_generated_tokens_total", route="/v1/completions") == 4
    assert grown("mii_http_time_to_first_token_seconds_count", route="/mii") == 1
    assert grown("mii_http_time_per_output_token_seconds_count", route="/v1/completions") == 1
    assert grown("mii_http_request_seconds_count", route="/mii") == 4
    assert value(after, "mii_http_requests_running", route="/mii") == 0


def test_a_client_that_hangs_up_is_counted_as_499(gateway: HttpFixture) -> None:
    before = gateway.fake.cancelled
    body = {"prompts": "!slow", "stream": True}
    with gateway.http.stream("POST", "/mii/a%20b/c", json=body) as response:
        pieces = response.iter_bytes()
        next(pieces)
        assert value(read(gateway), "mii_http_requests_running", route="/mii") == 1
    gateway.wait_cancelled(before + 1)
    samples = read(gateway)
    assert value(samples, "mii_http_requests_total", route="/mii", status="499") == 1
    assert value(samples, "mii_http_requests_running", route="/mii") == 0


def test_a_deployment_that_is_gone_is_down_and_the_page_is_there() -> None:
    with serving(create_app, balancer="127.0.0.1:1") as gateway:
        samples = read(gateway)
        assert value(samples, "mii_up") == 0
        assert not any(name.startswith("mii_kv") for name, _ in samples)


def test_a_replica_that_says_nothing_is_not_ready_and_has_no_numbers() -> None:
    stats = {**STATS, "replicas": [{"replica": 3, "ready": False}]}
    samples = {
        (sample.name, sample.labels.get("replica")): sample.value
        for family in deployment_metrics(stats)
        for sample in family.samples
    }
    assert samples["mii_replica_ready", "3"] == 0
    assert ("mii_kv_usage", "3") not in samples


def test_a_replica_that_is_asked_itself_is_replica_0() -> None:
    (replica,) = [STATS["replicas"][0]]  # type: ignore[index]
    names = {
        (sample.name, sample.labels.get("replica"))
        for family in deployment_metrics(replica)
        for sample in family.samples
    }
    assert ("mii_generated_tokens_total", "0") in names
