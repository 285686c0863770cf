"""The load balancer over replicas that follow a script: who gets what, what is tried again, what callers are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mii.grpc_related import dispatch
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS, REQUEST_ID, SERVICE_NAME, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.statuses import KIND, NO_RETRY, RETRY_AFTER
from tests.serving.deployments import wait_until
from tests.serving.scripted import Balancer, Scripted, balancing, echo, ends_with, scripted

QUEUE = 20
LOST = ends_with(grpc.StatusCode.UNAVAILABLE, (KIND, "ServerUnavailableError"))
METHODS = ("GeneratorReply", "GeneratorReplyStream")


class Setup:
    """A load balancer over two scripted replicas, and a stub to it."""

    def __init__(self, replicas: list[Scripted], balancer: Balancer) -> None:
        self.replicas, self.balancer = replicas, balancer
        self.channel = grpc.insecure_channel(balancer.address, CHANNEL_OPTIONS)
        self.stub = ModelResponseStub(self.channel)

    def ask(
        self, prompts: list[Any], method: str = "GeneratorReply", timeout: float = 20.0, **options: Any
    ) -> list[str]:
        """The texts of a call's answers."""
        request = pack_request(prompts, options)
        texts = [""] * len(prompts)
        if method == "GeneratorReply":
            replies = [self.stub.GeneratorReply(request, timeout=timeout)]
            assert [answer.index for answer in replies[0].response] == list(range(len(prompts)))
        else:
            replies = self.stub.GeneratorReplyStream(request, timeout=timeout)
        for reply in replies:
            for answer in reply.response:
                texts[answer.index] += answer.error or answer.response
        return texts

    def error(self, prompts: list[Any], method: str = "GeneratorReply", timeout: float = 20.0) -> Any:
        """How a call fails."""
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(prompts, method, timeout)
        return caught.value

    @property
    def calls(self) -> list[int]:
        return [replica.calls for replica in self.replicas]

    def stats(self) -> Any:
        return json.loads(self.stub.Stats(Empty()).json)

    def wait_ready(self, count: int = 2) -> None:
        wait_until(lambda: self.stats()["balancer"]["replicas_ready"] == count)


@pytest.fixture
def setup() -> Iterator[Setup]:
    replicas = [Scripted(), Scripted()]
    with ExitStack() as stack:
        ports = [stack.enter_context(scripted(replica)) for replica in replicas]
        balancer = stack.enter_context(balancing([f"127.0.0.1:{port}" for port in ports], QUEUE))
        setup = Setup(replicas, balancer)
        setup.wait_ready()
        yield setup
        wait_until(lambda: setup.stats()["balancer"]["outstanding"] == 0)
        setup.channel.close()


class Held:
    """A script that waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, request: Any, context: Any, call: int) -> Iterator[Any]:
        context.add_callback(self.go.set)  # when the call is over
        assert self.go.wait(20)
        yield from echo(request, context, call)


def both(setup: Setup, script: Any) -> None:
    for replica in setup.replicas:
        replica.script = script


# Who gets what


def test_calls_go_to_the_replica_with_less_to_do(setup: Setup) -> None:
    held = Held()
    both(setup, held)
    with ThreadPoolExecutor(8) as pool:
        answers: list[Future[list[str]]] = []
        for count in range(1, 9):
            answers.append(pool.submit(setup.ask, [f"prompt {count}"]))
            wait_until(lambda count=count: sum(setup.calls) == count)  # type: ignore[misc]
        assert setup.calls == [4, 4]
        held.go.set()
        assert [answer.result() for answer in answers] == [[f"prompt {count}"] for count in range(1, 9)]


def test_what_may_be_long_counts_for_more(setup: Setup) -> None:
    held = Held()
    both(setup, held)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(setup.ask, ["long"], max_new_tokens=1000)]
        wait_until(lambda: sum(setup.calls) == 1)
        for count in range(2, 7):
            answers.append(pool.submit(setup.ask, ["short"], max_new_tokens=10))
            wait_until(lambda count=count: sum(setup.calls) == count)  # type: ignore[misc]
        assert sorted(setup.calls) == [1, 5]
        held.go.set()
        assert all(answer.result() for answer in answers)


def test_prompts_that_begin_alike_go_to_the_same_replica(setup: Setup) -> None:
    for system in ("You are kind. ", "You are brief. ", "You are a pirate. ", "You are French. "):
        before = setup.calls
        for number in range(5):
            setup.ask([system * 100 + str(number)])
        assert 5 in [now - then for now, then in zip(setup.calls, before, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_the_prompts_of_a_call_are_spread_and_keep_their_order(setup: Setup, method: str) -> None:
    prompts = [f"prompt {number}" for number in range(13)]
    assert setup.ask(prompts, method, stop=["x"], top_p=0.9) == prompts
    assert setup.calls == [1, 1]
    parts = [replica.requests[0] for replica in setup.replicas]
    assert sorted(place for part in parts for place in part.positions) == list(range(13))
    assert all(abs(len(part.positions) - 6.5) < 1 for part in parts)
    assert all(part.query_kwargs["stop"].lvalue.values[0].svalue == "x" for part in parts)
    assert all(part.query_kwargs["top_p"].dvalue == 0.9 for part in parts)


def test_texts_and_tokens_of_a_call_keep_their_places(setup: Setup) -> None:
    setup.ask(["a", [1, 2], "b", [3], "c", [4]])
    found = {}
    for replica in setup.replicas:
        (part,) = replica.requests
        prompts = [*part.request, *(list(prompt.ids) for prompt in part.token_prompts)]
        found.update(zip(part.positions, prompts, strict=True))
    assert found == {0: "a", 1: [1, 2], 2: "b", 3: [3], 4: "c", 5: [4]}


def test_a_call_without_prompts_is_answered(setup: Setup) -> None:
    for method in METHODS:
        assert setup.ask([], method) == []


def test_deadline_and_metadata_go_on_to_the_replica_but_for_the_token(setup: Setup) -> None:
    given = ((REQUEST_ID, "my name"), ("own-key", "own value"), ("own-bin", b"\0\xff"), (TOKEN, "secret"))
    setup.stub.GeneratorReply(pack_request(["x"], {}), timeout=7, metadata=given)
    (context,) = [context for replica in setup.replicas for context in replica.contexts]
    metadata = dict(context.invocation_metadata())
    assert metadata[REQUEST_ID] == "my name" and metadata["own-key"] == "own value"
    assert metadata["own-bin"] == b"\0\xff" and TOKEN not in metadata
    assert 0 < context.time_remaining() < 7 or not context.is_active()
    assert sum(setup.calls) == 1


def test_a_stream_keeps_its_name(setup: Setup) -> None:
    list(setup.stub.GeneratorReplyStream(pack_request(["x"], {}), metadata=((REQUEST_ID, "my name"),)))
    (context,) = [context for replica in setup.replicas for context in replica.contexts]
    assert dict(context.invocation_metadata())[REQUEST_ID] == "my name"


# What is tried again


@pytest.mark.parametrize("method", METHODS)
def test_another_replica_takes_what_one_could_not_begin(setup: Setup, method: str) -> None:
    setup.replicas[0].script = LOST
    for number in range(6):
        assert setup.ask([f"{number}"], method) == [f"{number}"]
    assert setup.stats()["balancer"]["retries"] == setup.replicas[0].calls > 0


def test_a_stream_that_has_begun_ends_with_an_error(setup: Setup) -> None:
    both(setup, ends_with(grpc.StatusCode.UNAVAILABLE, (KIND, "ServerUnavailableError"), after=1))
    error = setup.error(["x"], "GeneratorReplyStream")
    assert error.code() is grpc.StatusCode.UNAVAILABLE and error.details() == "as the script says"
    assert NO_RETRY in error.trailing_metadata()
    assert sum(setup.calls) == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_no_replica_can_do_ends_with_an_error_soon(
    setup: Setup, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_HOLD_SECONDS", 0.2)
    both(setup, LOST)
    error = setup.error(["x"], method)
    assert error.code() is grpc.StatusCode.UNAVAILABLE and error.details() == "as the script says"
    assert NO_RETRY in error.trailing_metadata() and (KIND, "ServerUnavailableError") in error.trailing_metadata()
    assert setup.calls == [1, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_what_would_fail_anywhere_is_not_tried_again(setup: Setup, method: str, code: grpc.StatusCode) -> None:
    both(setup, ends_with(code, (KIND, "PromptTooLongError"), ("own", "metadata")))
    error = setup.error(["x"], method)
    assert (error.code(), error.details()) == (code, "as the script says")
    assert {(KIND, "PromptTooLongError"), ("own", "metadata")} <= set(error.trailing_metadata())
    assert sum(setup.calls) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_that_says_it_is_full_is_passed_by(setup: Setup, method: str) -> None:
    full = ends_with(grpc.StatusCode.RESOURCE_EXHAUSTED, (RETRY_AFTER, "700"))
    setup.replicas[0].script = full
    for number in range(4):
        assert setup.ask([f"{number}"], method) == [f"{number}"]
    setup.replicas[1].script = full
    error = setup.error(["x"], method)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (RETRY_AFTER, "700") in error.trailing_metadata()


@pytest.mark.parametrize("method", METHODS)
def test_a_call_waits_for_a_replica_that_is_about_to_come(setup: Setup, method: str) -> None:
    for replica in setup.replicas:
        replica.serve(False)
    setup.wait_ready(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(setup.ask, ["x"], method)
        wait_until(lambda: setup.stats()["balancer"]["held_calls"] == 1)
        setup.replicas[1].serve(True)
        assert answer.result() == ["x"]
    assert setup.calls == [0, 1]
    setup.replicas[0].serve(True)


def test_nobody_waits_for_long(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_HOLD_SECONDS", 0.2)
    for replica in setup.replicas:
        replica.serve(False)
    setup.wait_ready(0)
    error = setup.error(["x"])
    assert error.code() is grpc.StatusCode.UNAVAILABLE and NO_RETRY in error.trailing_metadata()
    assert error.details().startswith("no replica can answer now (replica 0: it has no engine now; replica 1: ")
    assert setup.error(["x"], timeout=0.05).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_replica_that_is_not_well_is_left_out_and_taken_back(setup: Setup) -> None:
    setup.replicas[0].serve(False)
    setup.wait_ready(1)
    for number in range(4):
        setup.ask([f"{number}"])
    assert setup.calls == [0, 4]
    setup.replicas[0].serve(True)
    setup.wait_ready()
    held = Held()
    both(setup, held)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(setup.ask, ["x"]), pool.submit(setup.ask, ["y"])]
        wait_until(lambda: setup.calls == [1, 5])
        held.go.set()
        assert [answer.result() for answer in answers] == [["x"], ["y"]]


def test_a_replica_that_is_gone_is_found_again() -> None:
    with alone(echo) as setup:
        (replica,) = setup.replicas
        assert setup.ask(["x"]) == ["x"]
        replica.server.stop(0).wait()
        setup.wait_ready(0)
        with scripted(replica, replica.port):
            assert setup.ask(["y"]) == ["y"]


# Split calls whose parts fail


def test_a_replica_that_is_taken_away_ends_what_it_has_and_gets_no_more(setup: Setup) -> None:
    first, second = (f"127.0.0.1:{replica.port}" for replica in setup.replicas)
    go_on = threading.Event()

    def slow(request: Any, context: Any, call: int) -> Iterator[Any]:
        for reply in echo(request, context, call):
            yield reply
            assert call > 1 or go_on.wait(20)

    for replica in setup.replicas:
        replica.script = slow
    streams = [setup.stub.GeneratorReplyStream(pack_request([text], {}), timeout=20) for text in "ab"]
    for stream in streams:
        next(stream)
    assert setup.calls == [1, 1]
    setup.balancer.set_replicas([first])
    assert [len(setup.ask(["x"], method)) for method in METHODS for _ in range(3)] == [1] * 6
    go_on.set()
    assert ["".join(answer.response for reply in stream for answer in reply.response) for stream in streams]
    assert setup.calls == [7, 1]
    setup.balancer.set_replicas([first, second])
    setup.wait_ready()
    assert len(set(map(tuple, (setup.ask([text * 9]) for text in "abcdef")))) == 6
    assert [entry.address for entry in setup.stub.Health(Empty()).replicas] == [first, second]


def test_without_replicas_calls_are_refused_and_one_that_comes_takes_the_next(setup: Setup) -> None:
    setup.balancer.set_replicas([])
    assert "there is none" in setup.error(["x"]).details()
    setup.balancer.set_replicas([f"127.0.0.1:{setup.replicas[1].port}"])
    assert setup.ask(["x"]) == setup.ask(["x"])
    assert setup.calls == [0, 2]


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
    assert time.monotonic() - started < 5
    assert held.go.wait(5)  # the other part is cancelled


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
        assert not replica.calls or script.go.wait(5)
    wait_until(lambda: setup.stats()["balancer"]["calls"].get("CANCELLED") == 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_deadline_ends_the_call_at_the_replica(setup: Setup, method: str) -> None:
    held = Held()
    both(setup, held)
    assert setup.error(["x"], method, timeout=0.3).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert held.go.wait(5)
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


@contextmanager
def alone(script: Any) -> Iterator[Setup]:
    """A load balancer over one replica, which the test ends itself."""
    replica = Scripted()
    replica.script = script
    with scripted(replica) as port, balancing([f"127.0.0.1:{port}"]) as balancer:
        setup = Setup([replica], balancer)
        setup.wait_ready(1)
        yield setup
        setup.channel.close()


def test_it_drains() -> None:
    held = Held()
    with alone(held) as setup, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(setup.ask, ["x"])
        wait_until(lambda: setup.calls == [1])
        stopped = pool.submit(setup.balancer.stop, 10.0)
        time.sleep(0.2)
        assert setup.error(["y"]).code() is grpc.StatusCode.UNAVAILABLE
        held.go.set()
        assert answer.result() == ["x"]
        stopped.result(5)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_end_in_time_is_ended_and_told_why(method: str) -> None:
    with alone(Held()) as setup, ThreadPoolExecutor(1) as pool:
        error = pool.submit(setup.error, ["x"], method)
        wait_until(lambda: setup.calls == [1])
        setup.balancer.stop(0.2)
        assert error.result().code() is grpc.StatusCode.UNAVAILABLE
        assert error.result().details() == "the deployment is shutting down; what ran was given time to end"
