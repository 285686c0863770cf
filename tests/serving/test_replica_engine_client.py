"""The connection between a front and an engine process, without gRPC and text."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mii.backend.engine_client import EngineClient
from mii.backend.messages import EngineInfo, Refused
from mii.batching.data_classes import EngineRequest, TokenOutput
from mii.errors import ServerUnavailableError
from tests.serving.calls import in_loop
from tests.serving.replicas import Replica
from tests.serving.standin import Options, answer


class Listener:
    """Writes down what it is told, in order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_ready(self, info: EngineInfo) -> None:
        self.heard.append(info)

    def on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        self.heard.extend(outputs)

    def on_refused(self, refused: Refused) -> None:
        self.heard.append(refused)

    def on_lost(self, reason: str) -> None:
        self.heard.append(reason)

    async def wait_for(self, kind: type, count: int = 1) -> list[Any]:
        """Those of a kind, once there are so many."""
        while len(found := [each for each in self.heard if isinstance(each, kind)]) < count:
            await asyncio.sleep(0.005)
        return found


@asynccontextmanager
async def connected(replica: Replica, silence_seconds: float = 60.0) -> AsyncIterator[tuple[EngineClient, Listener]]:
    listener = Listener()
    client = EngineClient(replica.folder.engine_address(0), listener, silence_seconds=silence_seconds)
    client.start()
    try:
        yield client, listener
    finally:
        await client.close()


@pytest.fixture
def replica(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """An engine process without a front."""
    options = getattr(request, "param", Options(step_seconds=0.002))
    replica = Replica(tmp_path / "d", tmp_path, options=options)
    replica.engine.start()
    yield replica
    replica.stop()


def request(uid: int, tokens: int = 5, prompt: Sequence[int] = (1, 2)) -> EngineRequest:
    return EngineRequest(uid, list(prompt), tokens)


def test_it_waits_for_the_engine_and_gets_every_token_in_order(replica: Replica) -> None:
    async def run() -> list[TokenOutput]:
        async with connected(replica) as (client, listener):
            with pytest.raises(ServerUnavailableError, match="not come up yet"):
                client.add([request(1)])
            await listener.wait_for(EngineInfo)
            client.add([request(1), request(2)])
            assert client.outstanding == 2
            outputs = await listener.wait_for(TokenOutput, 10)
            assert client.outstanding == 0
            return outputs

    outputs = in_loop(run())
    for uid in (1, 2):
        own = [output for output in outputs if output.uid == uid]
        assert [output.token_ids for output in own] == [[answer([1, 2], place)] for place in range(5)]
        assert [output.finish_reason for output in own] == [None] * 4 + ["length"]


@pytest.mark.parametrize("replica", [Options(num_blocks=10, step_seconds=0.002)], indirect=True)
def test_a_request_that_cannot_run_is_refused_alone(replica: Replica) -> None:
    async def run() -> list[Any]:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            client.add([request(1, 1000), request(2)])
            await listener.wait_for(TokenOutput, 5)
            return await listener.wait_for(Refused)

    (refused,) = in_loop(run())
    assert (refused.uid, refused.kind) == (1, "PromptTooLongError") and "10" in refused.error


def test_an_abort_frees_what_a_request_holds_before_the_next_step(replica: Replica) -> None:
    async def run() -> None:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            client.add([request(1, 5000), request(2, 5000)])
            await listener.wait_for(TokenOutput, 4)
            client.abort([1, 77])
            stats = await client.ask(30.0)
            assert (stats.running, client.outstanding) == (1, 1)
            client.abort([2])
            stats = await client.ask(30.0)
            assert (stats.running, stats.free_blocks) == (0, stats.num_blocks)

    in_loop(run())


@pytest.mark.parametrize("replica", [Options(step_seconds=2.0)], indirect=True)
def test_a_long_step_is_not_an_illness(replica: Replica) -> None:
    async def run() -> None:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            client.add([request(1, 100)])
            await listener.wait_for(TokenOutput)
            await asyncio.sleep(0.5)  # before the next step begins the engine reads what has come
            with pytest.raises(TimeoutError):
                await client.ask(0.1)
            assert await client.check(0.1) == ""

    in_loop(run())


def test_an_idle_engine_that_does_not_answer_is_ill(replica: Replica) -> None:
    async def run() -> None:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            assert await client.check(30.0) == ""
            replica.engine.signal(signal.SIGSTOP)
            assert "did not answer" in await client.check(0.2)
            replica.engine.signal(signal.SIGCONT)
            assert await client.check(30.0) == ""

    in_loop(run())


def test_what_the_engine_said_before_its_end_is_heard_first(replica: Replica) -> None:
    async def run() -> tuple[list[Any], list[Any]]:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            client.add([request(1, 5000)])
            await listener.wait_for(TokenOutput, 20)
            waiting = asyncio.create_task(client.ask(30.0))
            replica.engine.signal(signal.SIGSTOP)
            waiting_too = asyncio.create_task(client.ask(30.0))
            replica.engine.signal(signal.SIGKILL)
            await listener.wait_for(str)
            ends = await asyncio.gather(waiting, waiting_too, return_exceptions=True)
            heard = list(listener.heard)
            await asyncio.to_thread(replica.wait_ended, replica.engine)
            replica.engine.start()
            await listener.wait_for(EngineInfo, 2)
            client.add([request(1, 3)])
            await listener.wait_for(TokenOutput, len(await listener.wait_for(TokenOutput)) + 3)
            return heard, ends

    heard, ends = in_loop(run())
    tokens = [each for each in heard if isinstance(each, TokenOutput)]
    assert [token.token_ids[0] for token in tokens] == [answer([1, 2], place) for place in range(len(tokens))]
    assert heard[-1] == "the engine process has ended"
    assert isinstance(ends[1], ServerUnavailableError)


def test_a_front_that_goes_takes_its_requests_with_it(replica: Replica) -> None:
    """Also one that says nothing when it goes; and its successor's numbers may be the same."""

    async def run() -> None:
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            client.add([request(uid, 5000) for uid in range(5)])
            await listener.wait_for(TokenOutput, 20)
        async with connected(replica) as (client, listener):
            await listener.wait_for(EngineInfo)
            stats = await client.ask(30.0)
            assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
            client.add([request(3, 2)])
            assert [output.uid for output in await listener.wait_for(TokenOutput, 2)] == [3, 3]

    in_loop(run())
