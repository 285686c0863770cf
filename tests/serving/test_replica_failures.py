"""What happens to callers when a process of a replica is killed, hangs, fails, or is asked to end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mii.grpc_related.convert import pack_request
from mii.grpc_related.replica_server import ReplicaServer
from mii.grpc_related.text_session import TextSession
from mii.modeling.tokenizers import load_tokenizer
from tests.serving.calls import Streamed, ask, connected, in_loop, status, stream
from tests.serving.deployments import wait_until
from tests.serving.replicas import Replica, running_replica
from tests.serving.standin import Options

Start = Callable[..., Any]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def options(**changes: Any) -> Options:
    return Options(**{"step_seconds": 0.005, "vocab_size": 49152, "max_length": 100_000, **changes})


async def ends_of_calls(replica: Replica, calls: int, harm: Callable[[], object]) -> tuple[list[Any], float]:
    """How calls end that run when `harm` is done, half of them streams, and how long after it the last one ends."""
    async with connected(replica.address) as stub:
        kinds = [stream, ask]
        tasks = [
            asyncio.create_task(status(kinds[number % 2](stub, [f"call {number}"], max_new_tokens=50_000)))
            for number in range(calls)
        ]
        await asyncio.to_thread(wait_until, lambda: replica.stats()["engine"]["running"] == calls)
        start = time.monotonic()
        harm()
        ends = await asyncio.gather(*tasks)
        return ends, time.monotonic() - start


def serves(replica: Replica) -> bool:
    stub = health_pb2_grpc.HealthStub(replica.channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=30)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_killed_engine_ends_every_call_at_once_and_its_successor_serves(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options()) as replica:
        for _ in range(2):
            kill = in_loop(ends_of_calls(replica, 60, lambda: replica.engine.signal(signal.SIGKILL)))
            ends, seconds = kill
            assert [end.code() for end in ends] == [UNAVAILABLE] * 60
            assert all("the engine process has ended" in end.details() for end in ends)
            assert seconds < 10.0
            health = replica.health()
            assert not health.ready and "has ended" in health.reason and not serves(replica)

            async def refused() -> Any:
                async with connected(replica.address) as stub:
                    return await status(ask(stub, ["hi"], max_new_tokens=1))

            end = in_loop(refused())
            assert end is not None and end.code() is UNAVAILABLE and "try again" in (end.details() or "")
            replica.start_engine()
            wait_until(lambda: serves(replica))

            async def served() -> list[Any]:
                async with connected(replica.address) as stub:
                    return await ask(stub, ["hi"], max_new_tokens=5)

            assert in_loop(served())[0].generated_tokens == 5
            assert replica.wait_idle()["outstanding"] == 0


def test_a_hung_engine_counts_as_dead_and_is_ended(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options(), silence_seconds=1.0) as replica:
        ends, seconds = in_loop(ends_of_calls(replica, 10, lambda: replica.engine.signal(signal.SIGSTOP)))
        assert [end.code() for end in ends] == [UNAVAILABLE] * 10
        assert "said nothing for" in ends[0].details()
        assert 0.9 < seconds < 10.0
        replica.wait_ended(replica.engine)
        assert "SIGKILL" in replica.engine.state.last_end


def test_an_engine_that_is_idle_for_long_is_not_called_hung(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options(), silence_seconds=0.3) as replica:
        time.sleep(1.0)

        async def run() -> list[Any]:
            async with connected(replica.address) as stub:
                return await ask(stub, ["hi"], max_new_tokens=5)

        assert in_loop(run())[0].generated_tokens == 5
        assert replica.stats()["engine"]["lives"] == 1


def test_an_engine_that_fails_says_why(smollm2: Path, tmp_path: Path) -> None:
    """Also a step that is tried again fails, so the process ends; everybody and the supervisor know the reason."""
    with running_replica(tmp_path / "d", smollm2, options=options(poison=4242)) as replica:

        async def run() -> tuple[Any, Any]:
            async with connected(replica.address) as stub:
                innocent = asyncio.create_task(status(stream(stub, ["hi"], max_new_tokens=50_000)))
                await asyncio.to_thread(wait_until, lambda: replica.stats()["engine"]["running"] == 1)
                return await status(ask(stub, [[4242]], max_new_tokens=5)), await innocent

        for end in in_loop(run()):
            assert end is not None and end.code() is UNAVAILABLE
            assert "FloatingPointError: the numbers of a request are not finite" in (end.details() or "")
        replica.wait_ended(replica.engine)
        assert "not finite" in replica.engine.reason
        assert "Traceback" in replica.engine.log_tail()


def test_a_killed_front_takes_its_requests_out_of_the_engine(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options()) as replica:
        ends, seconds = in_loop(ends_of_calls(replica, 20, lambda: replica.front.signal(signal.SIGKILL)))
        assert [end.code() for end in ends] == [UNAVAILABLE] * 20 and seconds < 10.0
        replica.wait_ended(replica.front)
        replica.front.start()
        replica.wait_ready()
        replica.wait_idle()
        assert replica.engine.state.restarts == 0


@pytest.mark.parametrize(
    "answer", [b"", b"\xc1", b"\x81\xa4type\xa5ready", os.urandom(64)], ids=["empty", "nil", "other", "random"]
)
def test_the_engine_ignores_messages_that_are_none(smollm2: Path, tmp_path: Path, answer: bytes) -> None:
    import zmq

    with (
        running_replica(tmp_path / "d", smollm2, options=options()) as replica,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as stranger,
    ):
        stranger.connect(replica.folder.engine_address(0))
        for _ in range(10):
            stranger.send(answer)

        async def run() -> list[Any]:
            async with connected(replica.address) as stub:
                return await ask(stub, ["hi"] * 5, max_new_tokens=20)

        assert len(in_loop(run())) == 5


def test_a_front_that_is_asked_to_end_lets_calls_finish(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options(), drain_seconds=20) as replica:

        async def run() -> tuple[Any, Any]:
            async with connected(replica.address) as stub:
                running = asyncio.create_task(stream(stub, ["hi"], max_new_tokens=200))
                await asyncio.to_thread(wait_until, lambda: replica.stats()["engine"]["running"] == 1)
                replica.front.signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                async with connected(replica.address) as late:
                    return await status(ask(late, ["hi"], max_new_tokens=1)), await running

        late, streamed = in_loop(run())
        assert late is not None and late.code() is UNAVAILABLE
        assert streamed.reasons == {0: "length"} and len(streamed.texts[0]) == 200
        replica.wait_ended(replica.front)
        replica.engine.signal(signal.SIGTERM)
        replica.wait_ended(replica.engine)
        assert [child.state.last_end for child in (replica.front, replica.engine)] == ["ended with exit code 0"] * 2


def test_a_call_that_outlasts_the_drain_is_told_so(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options(), drain_seconds=0.5) as replica:
        ends, seconds = in_loop(ends_of_calls(replica, 4, lambda: replica.front.signal(signal.SIGTERM)))
        assert [(end.code(), "shutting down" in end.details()) for end in ends] == [(UNAVAILABLE, True)] * 4
        assert 0.4 < seconds < 10.0
        replica.wait_ended(replica.front)
        assert replica.front.state.last_end == "ended with exit code 0"


def test_a_client_that_never_reads_does_not_keep_the_front_from_ending(smollm2: Path, tmp_path: Path) -> None:
    with running_replica(tmp_path / "d", smollm2, options=options(step_seconds=0.001), drain_seconds=1) as replica:

        async def run() -> None:
            async with connected(replica.address) as stub:
                call = stub.GeneratorReplyStream(
                    pack_request([f"prompt {number}" for number in range(64)], {"max_new_tokens": 400})
                )
                await asyncio.to_thread(wait_until, lambda: replica.stats()["finished"].get("length", 0) == 64)
                replica.front.signal(signal.SIGTERM)
                await asyncio.to_thread(replica.wait_ended, replica.front)
                call.cancel()

        in_loop(run())
        assert replica.front.state.last_end == "ended with exit code 0"


def test_a_stream_that_nobody_reads_is_given_up_in_time(smollm2: Path, tmp_path: Path) -> None:
    """It is not even generated any more, and its neighbour on another connection lives on."""
    replica = Replica(tmp_path / "d", smollm2, options=options(step_seconds=0.001))
    window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))  # of what is not read yet

    async def read_two(address: str, session: TextSession) -> tuple[Streamed, grpc.aio.AioRpcError | None]:
        async with connected(address, *window) as slow, connected(address) as quick:
            prompts = [f"prompt {number}" for number in range(64)]
            call = slow.GeneratorReplyStream(pack_request(prompts, {"max_new_tokens": 50_000}))
            await call.read()
            read = await stream(quick, ["hi"], max_new_tokens=200)
            await asyncio.to_thread(wait_until, lambda: session.outstanding == 0)
            return read, await status(read_on(call))

    async def run() -> tuple[Streamed, grpc.aio.AioRpcError | None]:
        tokenizer, address = load_tokenizer(smollm2), replica.folder.engine_address(0)
        session = TextSession(tokenizer, address, queue_size=1000, silence_seconds=60)
        server = ReplicaServer(session, queue_size=1000, token="t", terminate=lambda reason: None, stall_seconds=0.4)
        port = await server.start("127.0.0.1", 0)
        try:
            await session.wait_ready()
            return await read_two(f"127.0.0.1:{port}", session)
        finally:
            await server.stop(0.1)

    try:
        replica.engine.start()
        read, error = in_loop(run())
    finally:
        replica.stop()
    assert read.reasons == {0: "length"}
    assert error is not None and error.code() is grpc.StatusCode.CANCELLED
    assert "took nothing for 0.4 s" in (error.details() or "")


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
