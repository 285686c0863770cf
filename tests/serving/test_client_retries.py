"""What the client tries again, and what it never does, against a server that follows a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from mii.backend import MIIClient, calls
from mii.config import MIIConfig
from mii.config.registry import save_deployment
from mii.errors import (
    AccessError,
    GenerationError,
    RequestTimeoutError,
    ServerBusyError,
    ServerUnavailableError,
    ServingError,
    UnsupportedFeatureError,
)
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply, SingleGenerationReply
from mii.grpc_related.statuses import KIND, NO_RETRY, RETRY_AFTER
from tests.serving.deployments import free_port
from tests.serving.scripted import Scripted, ends_with, scripted


@pytest.fixture
def servicer() -> Scripted:
    return Scripted()


@pytest.fixture
def client(servicer: Scripted, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[MIIClient]:
    monkeypatch.setattr(calls, "_PAUSES", (0.01, 0.02, 0.04))
    with scripted(servicer) as port, client_of(port) as client:
        yield client


def client_of(port: int, **options: Any) -> MIIClient:
    return MIIClient(MIIConfig(model_config={"model_name_or_path": "m"}, port_number=port), **options)


def every_way(client: MIIClient) -> list[Callable[[], Any]]:
    async def astream() -> list[Any]:
        return [pieces async for pieces in client.astream("one")]

    return [
        lambda: client.generate("one"),
        lambda: list(client.stream("one")),
        lambda: asyncio.run(client.generate_async("one")),
        lambda: asyncio.run(astream()),
    ]


@pytest.mark.parametrize("way", range(4))
def test_a_server_that_is_away_for_a_moment_is_asked_again(client: MIIClient, servicer: Scripted, way: int) -> None:
    servicer.script = ends_with(grpc.StatusCode.UNAVAILABLE, until=3)
    assert every_way(client)[way]()
    assert servicer.calls == 4


@pytest.mark.parametrize("way", range(4))
def test_the_attempts_are_bounded(client: MIIClient, servicer: Scripted, way: int) -> None:
    servicer.script = ends_with(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(
        ServerUnavailableError, match=r"deployment 'm-mii-deployment' at 127\.0\.0\.1:\d+ does not answer"
    ):
        every_way(client)[way]()
    assert servicer.calls == 4


@pytest.mark.parametrize("way", [1, 3])
def test_what_has_begun_is_never_run_twice(client: MIIClient, servicer: Scripted, way: int) -> None:
    servicer.script = ends_with(grpc.StatusCode.UNAVAILABLE, after=1)
    with pytest.raises(ServerUnavailableError):
        every_way(client)[way]()
    assert servicer.calls == 1


@pytest.mark.parametrize("way", range(4))
def test_a_server_that_has_tried_everything_is_believed(client: MIIClient, servicer: Scripted, way: int) -> None:
    servicer.script = ends_with(grpc.StatusCode.UNAVAILABLE, NO_RETRY, (KIND, "ServerUnavailableError"))
    with pytest.raises(ServerUnavailableError, match=r"^as the script says$"):
        every_way(client)[way]()
    assert servicer.calls == 1


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ServerBusyError, RuntimeError),
        (grpc.StatusCode.INTERNAL, GenerationError, RuntimeError),
        (grpc.StatusCode.UNKNOWN, GenerationError, RuntimeError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, RequestTimeoutError, TimeoutError),
        (grpc.StatusCode.CANCELLED, ServingError, RuntimeError),
        (grpc.StatusCode.PERMISSION_DENIED, AccessError, PermissionError),
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedFeatureError, NotImplementedError),
    ],
)
def test_everything_else_is_an_error_at_once(
    client: MIIClient, servicer: Scripted, way: int, code: grpc.StatusCode, kind: type, builtin: type
) -> None:
    servicer.script = ends_with(code)
    with pytest.raises(kind, match="as the script says") as caught:
        every_way(client)[way]()
    assert isinstance(caught.value, builtin) and isinstance(caught.value, grpc.RpcError)
    assert servicer.calls == 1


def test_a_full_queue_says_when_to_come_back(client: MIIClient, servicer: Scripted) -> None:
    servicer.script = ends_with(grpc.StatusCode.RESOURCE_EXHAUSTED, (RETRY_AFTER, "1500"))
    with pytest.raises(ServerBusyError) as caught:
        client.generate("one")
    assert caught.value.retry_after == 1.5


def test_the_time_holds_for_all_attempts_together(
    client: MIIClient, servicer: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_PAUSES", (0.2,) * 100)
    servicer.script = ends_with(grpc.StatusCode.UNAVAILABLE)
    started = time.monotonic()
    with pytest.raises((RequestTimeoutError, ServerUnavailableError)):
        client.generate("one", timeout=0.5)
    assert time.monotonic() - started < 5  # of the twenty that a hundred pauses take
    assert servicer.calls <= 3


def test_a_server_that_comes_up_in_the_meantime_answers(cache: Path) -> None:
    port = free_port(1)
    client = client_of(port)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, "one")
        time.sleep(0.5)
        with scripted(Scripted(), port):
            assert answer.result(60)
    client.close()


def test_nobody_there_is_told_soon_where_the_registry_knows(cache: Path) -> None:
    port = free_port(1)
    config = MIIConfig(model_config={"model_name_or_path": "m"}, port_number=port)
    file = save_deployment(config)
    started = time.monotonic()
    with (
        MIIClient(config) as client,
        pytest.raises(ServerUnavailableError, match="has ended: its supervisor was killed"),
    ):
        client.generate("one")
    with MIIClient(config) as client, pytest.raises(ServerUnavailableError, match="has ended"):
        client.wait_ready()
    assert time.monotonic() - started < 5  # of the ten that the pauses of two calls take
    file.unlink()


def test_it_waits_until_the_server_is_ready(client: MIIClient, servicer: Scripted) -> None:
    due = time.monotonic() + 0.4
    servicer.ready = lambda: time.monotonic() >= due
    client.wait_ready(60)
    assert time.monotonic() >= due
    servicer.ready = lambda: False
    with pytest.raises(RequestTimeoutError, match=r"was not ready within 1 s: it is loading"):
        client.wait_ready(1)


def test_answers_that_failed_leave_the_others(client: MIIClient, servicer: Scripted) -> None:
    good = SingleGenerationReply(response="good", finish_reason="stop", generated_tokens=2, index=1)
    bad = SingleGenerationReply(finish_reason="error", error="its engine died", index=0)
    servicer.script = lambda request, context, call: iter([MultiGenerationReply(response=[good, bad])])
    for way in (lambda: client.generate(["a", "b"]), lambda: asyncio.run(client.generate_async(["a", "b"]))):
        with pytest.raises(GenerationError, match="its engine died") as caught:
            way()
        assert caught.value.responses is not None
        failed, answered = caught.value.responses
        assert failed is None and answered is not None and answered.generated_text == "good"
    pieces: list[Any] = []
    with pytest.raises(GenerationError, match="its engine died"):
        client.generate(["a", "b"], pieces.extend)
    assert [(piece.index, piece.generated_text) for piece in pieces] == [(1, "good")]


def test_another_machines_deployment_ends_with_its_token(client: MIIClient, servicer: Scripted) -> None:
    with pytest.raises(AccessError, match="no token"):
        client.terminate_server()
    with client_of(client.port, token="secret") as owner:
        owner.terminate_server()
    with client_of(client.port, token="secret") as owner:
        asyncio.run(owner.terminate_async())
    assert servicer.tokens == ["", "secret", "secret"]
