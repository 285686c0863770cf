"""The load balancer over replicas that follow a script: who gets what, and what is tried again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from mii.grpc_related import dispatch
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import REQUEST_ID, TOKEN
from mii.grpc_related.statuses import KIND, NO_RETRY, RETRY_AFTER
from tests.serving.balancer_setup import LOST, METHODS, Held, Setup, alone, both, two_replicas
from tests.serving.deployments import wait_until
from tests.serving.scripted import echo, ends_with, scripted


@pytest.fixture
def setup() -> Iterator[Setup]:
    with two_replicas() as made:
        yield made


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
            assert call > 1 or go_on.wait(60)

    for replica in setup.replicas:
        replica.script = slow
    streams = [setup.stub.GeneratorReplyStream(pack_request([text], {}), timeout=60) for text in "ab"]
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
