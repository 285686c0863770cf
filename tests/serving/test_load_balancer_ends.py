"""How calls over a load balancer end: parts that fail, callers who go, full queues, the end of the deployment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import SERVICE_NAME, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest
from mii.grpc_related.statuses import RETRY_AFTER
from tests.serving.balancer_setup import LOST, METHODS, QUEUE, Held, Setup, alone, both, two_replicas
from tests.serving.deployments import PATIENCE_SECONDS, wait_until
from tests.serving.scripted import ends_with


@pytest.fixture
def setup() -> Iterator[Setup]:
    with two_replicas() as made:
        yield made


@pytest.mark.parametrize("method", METHODS)
def test_a_part_that_failed_leaves_the_others(setup: Setup, method: str) -> None:
    setup.replicas[1].script = ends_with(grpc.StatusCode.INTERNAL)
    texts = setup.ask([f"{number}" for number in range(6)], method)
    places = list(setup.replicas[0].requests[0].positions)
    assert texts == [str(place) if place in places else "as the script says" for place in range(6)]


def test_a_part_of_a_stream_that_breaks_says_which_answers_are_missing(setup: Setup) -> None:
    setup.replicas[1].script = ends_with(grpc.StatusCode.UNAVAILABLE, after=1)
    texts = setup.ask([f"{number}" for number in range(6)], "GeneratorReplyStream")
    places = list(setup.replicas[0].requests[0].positions)
    for place, text in enumerate(texts):
        assert (
            text == str(place)
            if place in places
            else text.startswith(f"{place}replica 1, which ran this call, is lost")
        )


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_all_failed_are_an_error(setup: Setup, method: str) -> None:
    both(setup, ends_with(grpc.StatusCode.INTERNAL))
    error = setup.error(["a", "b", "c", "d"], method)
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "as the script says")


@pytest.mark.parametrize("method", METHODS)
def test_what_the_caller_did_wrong_in_one_part_ends_the_whole_call(setup: Setup, method: str) -> None:
    held, refuse = Held(), ends_with(grpc.StatusCode.INVALID_ARGUMENT)

    def refuse_soon(*call: Any) -> Iterator[Any]:
        wait_until(lambda: setup.replicas[0].calls == 1)
        yield from refuse(*call)

    setup.replicas[0].script, setup.replicas[1].script = held, refuse_soon
    started = time.monotonic()
    assert setup.error(["a", "b", "c", "d"], method).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert time.monotonic() - started < 20  # of the minute that the other part would have waited
    assert held.go.wait(PATIENCE_SECONDS)  # the other part is cancelled


@pytest.mark.parametrize("method", METHODS)
def test_a_part_moves_to_the_other_replica(setup: Setup, method: str) -> None:
    setup.replicas[1].script = LOST
    prompts = [f"{number}" for number in range(6)]
    assert setup.ask(prompts, method) == prompts
    assert setup.calls == [2, 1]


# Ends of calls


@pytest.mark.parametrize("prompts", [["x"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("method", METHODS)
def test_a_caller_who_goes_away_ends_the_call_at_the_replicas(setup: Setup, method: str, prompts: list[str]) -> None:
    held = [Held(), Held()]
    for replica, script in zip(setup.replicas, held, strict=True):
        replica.script = script
    request = pack_request(prompts, {})
    call = (
        setup.stub.GeneratorReply.future(request) if method == METHODS[0] else setup.stub.GeneratorReplyStream(request)
    )
    wait_until(lambda: sum(setup.calls) == min(2, len(prompts)))
    call.cancel()
    for replica, script in zip(setup.replicas, held, strict=True):
        assert not replica.calls or script.go.wait(PATIENCE_SECONDS)
    wait_until(lambda: setup.stats()["balancer"]["calls"].get("CANCELLED") == 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_deadline_ends_the_call_at_the_replica(setup: Setup, method: str) -> None:
    held = Held()
    both(setup, held)
    assert setup.error(["x"], method, timeout=1.0).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert held.go.wait(PATIENCE_SECONDS)
    (context,) = [context for replica in setup.replicas for context in replica.contexts]
    wait_until(lambda: not context.is_active())


# Full queues


def test_queues_are_bounded_and_say_when_to_come_back(setup: Setup) -> None:
    held = Held()
    both(setup, held)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(setup.ask, ["x"] * QUEUE) for _ in range(2)]
        wait_until(lambda: setup.stats()["balancer"]["outstanding"] == 2 * QUEUE)
        error = setup.error(["y"])
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{2 * QUEUE} prompts are running or waiting" in error.details()
        assert int(dict(error.trailing_metadata())[RETRY_AFTER]) > 0
        held.go.set()
        assert [answer.result() for answer in answers] == [["x"] * QUEUE] * 2
    assert setup.ask(["y"]) == ["y"]


def test_a_call_that_is_larger_than_the_queues_is_taken_when_nothing_else_is_there(setup: Setup) -> None:
    assert setup.ask(["x"] * 5 * QUEUE) == ["x"] * 5 * QUEUE


# What is not a call


def test_what_is_no_message_is_refused(setup: Setup) -> None:
    for method in METHODS:
        raw = (setup.channel.unary_unary if method == METHODS[0] else setup.channel.unary_stream)(
            f"/{SERVICE_NAME}/{method}"
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(raw(b"\xff\xff\xff"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:
        setup.stub.GeneratorReply(MultiStringRequest(request=["a", "b"], positions=[0]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:
        setup.channel.unary_unary(f"/{SERVICE_NAME}/NoSuchMethod")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


# The deployment


def test_only_the_token_ends_the_deployment(setup: Setup) -> None:
    for metadata in ((), ((TOKEN, "wrong"),), ((TOKEN, ""),)):
        with pytest.raises(grpc.RpcError) as caught:
            setup.stub.Terminate(Empty(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
    assert setup.balancer.ended == []
    setup.stub.Terminate(Empty(), metadata=((TOKEN, "secret"),))
    assert len(setup.balancer.ended) == 1
    assert all(replica.tokens == [] for replica in setup.replicas)


def test_health_asks_every_replica(setup: Setup) -> None:
    health = setup.stub.Health(Empty())
    assert health.ready and [replica.device for replica in health.replicas] == ["cpu", "cpu"]
    assert len({replica.address for replica in health.replicas}) == 2
    setup.replicas[0].ready = lambda: False
    health = setup.stub.Health(Empty())
    assert health.ready and [replica.ready for replica in health.replicas] == [False, True]
    setup.replicas[1].ready = lambda: False
    health = setup.stub.Health(Empty())
    assert not health.ready and health.reason == "replica 0: it is loading; replica 1: it is loading"


def test_the_standard_health_service_says_whether_anybody_can_answer(setup: Setup) -> None:
    stub = health_pb2_grpc.HealthStub(setup.channel)
    for name in ("", SERVICE_NAME):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    for replica in setup.replicas:
        replica.serve(False)
    wait_until(lambda: stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING)


def test_statistics_are_everybodys(setup: Setup) -> None:
    setup.ask(["x"])
    stats = setup.stats()
    assert stats["balancer"]["calls"] == {"OK": 1}
    assert [(replica["replica"], replica["outstanding"], replica["ready"]) for replica in stats["replicas"]] == [
        (0, 3, True),
        (1, 3, True),
    ]


def test_the_service_can_be_looked_up(setup: Setup) -> None:
    services = ProtoReflectionDescriptorDatabase(setup.channel).get_services()
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(services)


def test_it_drains() -> None:
    held = Held()
    with alone(held) as setup, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(setup.ask, ["x"])
        wait_until(lambda: setup.calls == [1])
        stopped = pool.submit(setup.balancer.stop, 60.0)
        wait_until(lambda: setup.balancer.server._draining)
        time.sleep(0.2)  # from then on it stops to listen
        assert setup.error(["y"]).code() is grpc.StatusCode.UNAVAILABLE
        held.go.set()
        assert answer.result() == ["x"]
        stopped.result(30)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_end_in_time_is_ended_and_told_why(method: str) -> None:
    with alone(Held()) as setup, ThreadPoolExecutor(1) as pool:
        error = pool.submit(setup.error, ["x"], method)
        wait_until(lambda: setup.calls == [1])
        setup.balancer.stop(0.2)
        assert error.result().code() is grpc.StatusCode.UNAVAILABLE
        assert error.result().details() == "the deployment is shutting down; what ran was given time to end"
