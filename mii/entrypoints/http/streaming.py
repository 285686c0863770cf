"""Answers that are sent as they are made, and requests that end when whoever made them hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mii.entrypoints.http.errors import CLIENT_GONE, ApiError

__all__ = ["DONE", "ClientGoneError", "EventStream", "on_client_gone", "while_connected"]

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that is complete."""
T = TypeVar("T")
Events = AsyncGenerator[bytes, None]


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


class EventStream(Response):
    """Server-sent events. What goes wrong once it has begun becomes its last event.

    Args:
        events: whole events, as bytes; each item is written at once. It is closed when the client hangs up.
        on_end: called when the stream is over, with the status to count: 200, or what it ended with.
        headers: of the answer.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, on_end: Callable[[int], None], headers: dict[str, str] | None = None) -> None:
        # Proxies must pass events on as they come.
        self._events, self._on_end = events, on_end
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, watching = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_hung_up(receive))
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
            await self._events.aclose()
            self._on_end(status)

    async def _send(self, send: Send) -> int:
        status = 200
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for events in self._events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except ApiError as error:
            status = error.status
            await send({"type": "http.response.body", "body": error.event(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return status


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
