"""Answers that are sent as they are made, and requests that end when whoever made them hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mii.entrypoints.http.errors import CLIENT_GONE, ApiError
from mii.grpc_related.outlet import Rest, begin

__all__ = ["BODY_SEND", "DONE", "ClientGoneError", "EventSource", "EventStream", "on_client_gone", "while_connected"]

BODY_SEND = "mii_body_send"
"""Where a request's scope has the way past everything that looks at the heads of answers only."""
DONE = b"data: [DONE]\n\n"
"""The last event of a stream that is complete."""
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up before it had its answer."""


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Handler of `ClientGoneError`; nobody reads what it returns."""
    return Response(status_code=CLIENT_GONE)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Args:
        request: whose body has been read.
        work: what the client waits for.

    Raises:
        ClientGoneError: the client has hung up.
        Exception: what `work` raises.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
    if working.cancelled():
        raise ClientGoneError
    return working.result()


class EventSource(Protocol):
    """Where a stream's events come from."""

    over: bool
    """Whether there are no more events to `take`."""

    def take(self) -> bytes:
        """Whole events, all that are new; may be nothing.

        Raises:
            ApiError: the stream cannot go on.
        """

    def listen(self, tell: Callable[[], object] | None, offer: Callable[[Any], bool] | None) -> None:
        """Has `tell` called whenever there is something to take, or the stream is over. What comes while nothing waits
        is first given to `offer`, which makes `events` of it at once or returns False.
        """

    def events(self, offered: Any) -> bytes:
        """Whole events of what was offered; may be nothing.

        Raises:
            ApiError: the stream cannot go on.
        """

    async def close(self, status: int) -> None:
        """Ends what makes the events.

        Args:
            status: what the stream came to: 200, or that of what ended it.
        """


class EventStream(Response):
    """Server-sent events. What goes wrong once it has begun becomes its last event.

    Args:
        first: events to begin with.
        source: of the others; it is closed when all was sent or the client hangs up.
        headers: of the answer.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, source: EventSource, headers: dict[str, str] | None = None) -> None:
        # Proxies must pass events on as they come.
        self._first, self._source = first, source
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send(send, scope.get(BODY_SEND, send))
        sending, watching = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
        status = CLIENT_GONE
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                status = sending.result()
        finally:
            watching.cancel()
            if not sending.done():
                sending.cancel()
                await asyncio.wait((sending,))
            await self._source.close(status)

    async def _send(self, send: Send, send_body: Send) -> int:
        status = 200
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            await _Pump(self._source, send_body).run()
        except ApiError as error:
            status = error.status
            await send({"type": "http.response.body", "body": error.event(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return status


class _Pump:
    """Sends events in the moment in which they come, with no task to wake in between. While the client has no room, a
    task waits for it, and what comes meanwhile goes out together.
    """

    def __init__(self, source: EventSource, send: Send) -> None:
        self._source, self._send = source, send
        self._waiting: Rest | None = None
        self._failure: Exception | None = None
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until all was sent.

        Raises:
            Exception: the source's, or what went wrong in sending.
        """
        self._source.listen(self._advance, self._take_now)
        try:
            while not await self._ended():
                waiting, self._waiting = self._waiting, None
                assert waiting is not None
                await waiting
                self._turn = asyncio.get_running_loop().create_future()
                self._advance()
        finally:
            self._source.listen(None, None)
            if self._waiting is not None:
                self._waiting.close()

    async def _ended(self) -> bool:
        """Whether all was sent, once that is so or the client has no room."""
        await self._turn
        if self._failure is not None:
            raise self._failure
        return self._waiting is None

    def _advance(self) -> None:
        if not self._turn.done():
            self._put(self._source.take)

    def _take_now(self, offered: Any) -> bool:
        """Sends what has just come, unless something before it waits."""
        if self._turn.done():
            return False
        self._put(self._source.events, offered)
        return True

    def _put(self, make: Callable[..., bytes], *arguments: Any) -> None:
        """Sends the events that `make` gives, if there are some."""
        try:
            events = make(*arguments)
            if events:
                self._waiting = begin(self._send({"type": "http.response.body", "body": events, "more_body": True}))
        except Exception as error:
            self._failure = error
        if self._failure is not None or self._waiting is not None or self._source.over:
            self._turn.set_result(None)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
