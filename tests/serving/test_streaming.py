"""Events go out in the moment in which they come, and together once a client had no room for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mii.entrypoints.http.errors import CLIENT_GONE, ApiError
from mii.entrypoints.http.streaming import EventStream
from tests.serving.calls import in_loop


class Source:
    """Events that a test makes."""

    def __init__(self) -> None:
        self.waiting = b""
        self.over = False
        self.failure: ApiError | None = None
        self.closed: list[int] = []
        self._tell: Callable[[], object] | None = None
        self.offer: Callable[[Any], bool] | None = None

    def put(self, events: bytes, *, over: bool = False) -> None:
        self.waiting, self.over = self.waiting + events, over
        if self._tell is not None:
            self._tell()

    def fail(self, error: ApiError) -> None:
        self.failure = error
        self.put(b"")

    def take(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        events, self.waiting = self.waiting, b""
        return events

    def listen(self, tell: Callable[[], object] | None, offer: Callable[[Any], bool] | None) -> None:
        self._tell, self.offer = tell, offer
        if tell is not None:
            tell()

    def events(self, offered: Any) -> bytes:
        if isinstance(offered, ApiError):
            raise offered
        return bytes(offered)

    async def close(self, status: int) -> None:
        self.closed.append(status)


class Client:
    """One end of an HTTP connection, which may have no room."""

    def __init__(self) -> None:
        self.room, self.gone = asyncio.Event(), asyncio.Event()
        self.room.set()
        self.parts: list[bytes] = []
        self.sends = 0
        self.ended = False

    async def send(self, message: Any) -> None:
        self.sends += 1
        await self.room.wait()
        if message["type"] == "http.response.body":
            self.parts.append(message["body"])
            self.ended = not message["more_body"]

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def begin(source: Source, client: Client) -> asyncio.Task[None]:
    """Starts a stream; returns when it listens."""
    stream = EventStream(b"first", source)
    running = asyncio.ensure_future(stream({"type": "http"}, client.receive, client.send))
    while source._tell is None:
        await asyncio.sleep(0)
    return running


def test_an_event_is_sent_before_put_returns() -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        source.put(b"a")
        assert client.parts == [b"first", b"a"]
        source.put(b"b", over=True)
        await running
        assert client.parts == [b"first", b"a", b"b", b""] and client.ended
        assert source.closed == [200]

    in_loop(main())


def test_what_is_offered_is_sent_at_once_unless_something_waits() -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        assert source.offer is not None and source.offer(b"a") and source.offer(b"")
        assert client.parts == [b"first", b"a"] and client.sends == 3  # the head of the answer is the first
        client.room.clear()
        assert source.offer(b"b") and not source.offer(b"c")  # the first waits for room
        source.put(b"c")
        client.room.set()
        while len(client.parts) < 4:
            await asyncio.sleep(0)
        assert source.offer(b"d")
        source.put(b"e", over=True)
        await running
        assert client.parts == [b"first", b"a", b"b", b"c", b"d", b"e", b""]
        assert source.offer is None

    in_loop(main())


def test_an_error_of_what_is_offered_ends_the_stream() -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        error = ApiError(500, "broken", code="generation_failed")
        assert source.offer is not None and source.offer(error) and not source.offer(b"a")
        await running
        assert client.parts == [b"first", error.event(), b""] and source.closed == [500]

    in_loop(main())


def test_what_comes_while_the_client_has_no_room_goes_out_together() -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        client.room.clear()
        source.put(b"a")
        before = client.sends
        for letter in b"bcdefg":
            source.put(bytes([letter]))
            await asyncio.sleep(0)
        assert client.sends == before and client.parts == [b"first"]
        client.room.set()
        while len(client.parts) < 3:
            await asyncio.sleep(0)
        source.put(b"h", over=True)
        await running
        assert client.parts == [b"first", b"a", b"bcdefg", b"h", b""]

    in_loop(main())


def test_the_last_events_are_sent_when_they_come_without_room() -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        client.room.clear()
        source.put(b"a")
        source.put(b"b", over=True)
        client.room.set()
        await running
        assert client.parts == [b"first", b"a", b"b", b""]

    in_loop(main())


@pytest.mark.parametrize("room", [True, False])
def test_a_failure_is_the_last_event(room: bool) -> None:
    async def main() -> None:
        source, client = Source(), Client()
        running = await begin(source, client)
        if not room:
            client.room.clear()
            source.put(b"a")
        source.fail(ApiError(503, "the engine is lost"))
        client.room.set()
        await running
        assert b"the engine is lost" in client.parts[-2] and client.ended
        assert source.closed == [503]

    in_loop(main())


@pytest.mark.parametrize("room", [True, False])
def test_a_client_that_hangs_up_ends_what_makes_the_events(room: bool) -> None:
    async def main() -> None:
        source, client = Source(), Client()
        before = asyncio.all_tasks()
        running = await begin(source, client)
        if not room:
            client.room.clear()
            source.put(b"a")
            await asyncio.sleep(0)
        client.gone.set()
        await running
        assert source.closed == [CLIENT_GONE] and source._tell is None
        assert asyncio.all_tasks() == before

    in_loop(main())
