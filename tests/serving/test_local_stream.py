"""Streams over a unix socket between processes of one machine, and what their ends say to one another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mii.grpc_related.local_stream import LocalCall, LocalServer, LocalStream, nearest
from mii.grpc_related.options import MAX_MESSAGE_BYTES
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage, CallStart
from tests.serving.calls import in_loop

SILENCE_SECONDS = 0.8


def message(number: int, size: int = 0) -> bytes:
    raw: bytes = CallerMessage(starts=[CallStart(call=number, request=b"x" * size)]).SerializeToString()
    return raw


async def echo(stream: LocalStream) -> None:
    async for said in stream.messages():
        await stream.write(said.SerializeToString())


@asynccontextmanager
async def serving(
    tmp_path: Path, serve: Callable[[LocalStream], Awaitable[None]] = echo, silence: float = SILENCE_SECONDS
) -> AsyncIterator[tuple[LocalServer, LocalCall]]:
    server = LocalServer(tmp_path / "x.sock", serve)
    await server.start()
    call = LocalCall(tmp_path / "x.sock", silence)
    try:
        yield server, call
    finally:
        call.cancel()
        await server.stop()
        assert not (tmp_path / "x.sock").exists()


async def code_of(work: Awaitable[Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(work, 30)
    return caught.value.code()


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_messages_of_any_size_come_whole_and_in_order(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with serving(tmp_path, silence=10) as (_, call):
            sent = [message(number, size) for number in range(1, 6)]
            writing = asyncio.ensure_future(_write_all(call, sent))
            assert [await call.read() for _ in sent] == sent
            await writing

    in_loop(main())


def test_messages_are_offered_as_they_come_and_those_not_taken_are_read_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, silence=10) as (_, call):
            offered: list[bytes] = []
            sent = [message(number) for number in range(1, 7)]

            def take(came: bytes) -> bool:
                offered.append(came)
                return came not in sent[2:5]

            call.listen(take)
            for each in sent[:2]:
                await call.write(each)
            await _until(lambda: offered == sent[:2])
            for each in sent[2:5]:
                await call.write(each)
            assert [await call.read() for _ in range(3)] == sent[2:5]
            await call.write(sent[5])
            await _until(lambda: offered[:3] == sent[:3] and offered[-1] == sent[5])

    in_loop(main())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # `in_loop` ends what takes too long
        await asyncio.sleep(0.001)


async def _write_all(call: LocalCall, messages: list[bytes]) -> None:
    for each in messages:
        await call.write(each)


def test_when_the_server_is_done_what_it_wrote_still_comes_and_then_the_end(tmp_path: Path) -> None:
    async def once(stream: LocalStream) -> None:
        async for said in stream.messages():
            await stream.write(said.SerializeToString())
            return

    async def main() -> None:
        async with serving(tmp_path, once) as (server, call):
            await call.write(message(1, 50_000))
            await server.wait_ended()
            assert await call.read() == message(1, 50_000)
            assert await call.read() is grpc.aio.EOF
            assert await code_of(call.write(message(2))) is grpc.StatusCode.UNAVAILABLE

    in_loop(main())


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "x.sock"))  # as a process leaves it that was killed
        call = LocalCall(tmp_path / "x.sock", SILENCE_SECONDS)
        assert await code_of(call.read()) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(call.write(message(1))) is grpc.StatusCode.UNAVAILABLE
        call.cancel()

    in_loop(main())


def test_a_server_that_says_nothing_at_all_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as frozen:
            frozen.bind(str(tmp_path / "x.sock"))
            frozen.listen()
            call = LocalCall(tmp_path / "x.sock", SILENCE_SECONDS)
            began = asyncio.get_running_loop().time()
            assert await asyncio.wait_for(call.read(), 30) is grpc.aio.EOF
            assert asyncio.get_running_loop().time() - began >= SILENCE_SECONDS

    in_loop(main())


def test_a_server_that_has_nothing_to_say_is_not_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (_, call):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(call.read(), 2 * SILENCE_SECONDS)
            await call.write(message(1))
            assert await call.read() == message(1)

    in_loop(main())


def test_whoever_writes_waits_for_a_reader_that_takes_nothing(tmp_path: Path) -> None:
    written = 0

    async def talk(stream: LocalStream) -> None:
        nonlocal written
        for number in range(1, 2001):
            await stream.write(message(number, 300))
            written = number

    async def main() -> None:
        async with serving(tmp_path, talk) as (_, call):
            await call.read()
            await asyncio.sleep(2 * SILENCE_SECONDS)  # who does not read does not take the server for dead
            assert written < 1000
            rest = [await call.read() for _ in range(1999)]
            assert rest[-1] == message(2000, 300) and written == 2000

    in_loop(main())


def test_a_caller_that_goes_away_ends_the_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (server, call):
            await call.write(message(1))
            await call.read()
            call.cancel()
            await asyncio.wait_for(server.wait_ended(), 30)

    in_loop(main())


@pytest.mark.parametrize("noise", [(MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"), b"\x03\0\0\0\xff\xff\xff"])
def test_bytes_that_are_no_message_end_the_stream_and_nothing_else(tmp_path: Path, noise: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (_, call):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "x.sock"))
            writer.write(noise)
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
            await call.write(message(1))
            assert await call.read() == message(1)

    in_loop(main())


def test_without_a_socket_streams_go_over_grpc(tmp_path: Path) -> None:
    assert nearest(None, lambda: "gRPC", 1)() == "gRPC"
    assert nearest(tmp_path / "none.sock", lambda: "gRPC", 1)() == "gRPC"
