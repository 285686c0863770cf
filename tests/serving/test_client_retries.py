"""What the client tries again, and what it never does, against a server that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

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
from mii.grpc_related.options import SERVER_OPTIONS, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply, MultiGenerationReply, SingleGenerationReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseServicer, add_ModelResponseServicer_to_server
from mii.grpc_related.statuses import KIND, NO_RETRY, RETRY_AFTER

Script = Callable[[Any, int], Iterator[MultiGenerationReply]]
PIECE = MultiGenerationReply(response=[SingleGenerationReply(response="text", finish_reason="none")])
LAST = MultiGenerationReply(response=[SingleGenerationReply(finish_reason="stop", generated_tokens=1)])


class Scripted(ModelResponseServicer):
    """Runs a script at each call, which gets the context and the number of the call, from 1."""

    def __init__(self) -> None:
        self.script: Script = lambda context, call: iter([PIECE, LAST])
        self.calls = 0
        self.tokens: list[str] = []
        self.ready_after = 0.0

    def GeneratorReplyStream(self, request: Any, context: Any) -> Iterator[MultiGenerationReply]:
        self.calls += 1
        yield from self.script(context, self.calls)

    def GeneratorReply(self, request: Any, context: Any) -> MultiGenerationReply:
        self.calls += 1
        return next(iter(self.script(context, self.calls)))

    def Health(self, request: Any, context: Any) -> HealthReply:
        ready = time.monotonic() >= self.ready_after
        return HealthReply(ready=ready, reason="" if ready else "it is loading")

    def Terminate(self, request: Any, context: Any) -> Empty:
        self.tokens.append(dict(context.invocation_metadata()).get(TOKEN, ""))
        if self.tokens[-1] != "secret":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no token")
        return Empty()


@contextlib.contextmanager
def serving(servicer: Scripted, port: int = 0) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
    add_ModelResponseServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait()


@pytest.fixture
def servicer() -> Scripted:
    return Scripted()


@pytest.fixture
def client(servicer: Scripted, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[MIIClient]:
    monkeypatch.setattr(calls, "_PAUSES", (0.01, 0.02, 0.04))
    with serving(servicer) as port, client_of(port) as client:
        yield client


def client_of(port: int, **options: Any) -> MIIClient:
    return MIIClient(MIIConfig(model_config={"model_name_or_path": "m"}, port_number=port), **options)


def ends_with(code: grpc.StatusCode, *metadata: tuple[str, str], until: int = 1_000_000, after: int = 0) -> Script:
    """The first calls end so, after some pieces; later ones are answered."""

    def script(context: Any, call: int) -> Iterator[MultiGenerationReply]:
        if call > until:
            yield from (PIECE, LAST)
            return
        yield from [PIECE] * after
        context.set_trailing_metadata(metadata)
        context.abort(code, "as the script says")

    return script


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
    assert time.monotonic() - started < 0.7
    assert servicer.calls <= 3


def test_a_server_that_comes_up_in_the_meantime_answers(cache: Path) -> None:
    with serving(Scripted()) as port:
        pass
    client = client_of(port)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, "one")
        time.sleep(0.5)
        with serving(Scripted(), port):
            assert answer.result(10)
    client.close()


def test_nobody_there_is_told_soon_where_the_registry_knows(cache: Path) -> None:
    with serving(Scripted()) as port:
        pass
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
    assert time.monotonic() - started < 2
    file.unlink()


def test_it_waits_until_the_server_is_ready(client: MIIClient, servicer: Scripted) -> None:
    servicer.ready_after = time.monotonic() + 0.4
    client.wait_ready(10)
    assert time.monotonic() >= servicer.ready_after
    servicer.ready_after = time.monotonic() + 60
    with pytest.raises(RequestTimeoutError, match=r"was not ready within 0\.3 s: it is loading"):
        client.wait_ready(0.3)


def test_answers_that_failed_leave_the_others(client: MIIClient, servicer: Scripted) -> None:
    good = SingleGenerationReply(response="good", finish_reason="stop", generated_tokens=2, index=1)
    bad = SingleGenerationReply(finish_reason="error", error="its engine died", index=0)
    servicer.script = lambda context, call: iter([MultiGenerationReply(response=[good, bad])])
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
