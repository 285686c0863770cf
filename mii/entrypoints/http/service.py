"""What the routes of an HTTP server share: they ask the deployment, and its answers go out whole or as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from mii.entrypoints.http.backend import Backend, Call, Piece
from mii.entrypoints.http.bodies import ApiModel, read_body
from mii.entrypoints.http.errors import CLIENT_GONE, ApiError
from mii.entrypoints.http.metrics import Measured, Meter
from mii.entrypoints.http.settings import HttpSettings
from mii.entrypoints.http.streaming import DONE, ClientGoneError, EventStream, while_connected

__all__ = ["EventFrames", "HttpService", "json_response"]

_encode = msgspec.json.Encoder().encode
Model = TypeVar("Model", bound=ApiModel)


class EventFrames(Protocol):
    """Makes the events of one stream."""

    def opening(self) -> bytes:
        """Events that come before any other, with the first of those."""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """Events of what has come; may be nothing.

        Raises:
            ApiError: the stream cannot go on.
        """

    def closing(self) -> bytes:
        """Events that come when everything has."""


class HttpService:
    """The deployment behind an HTTP server.

    Args:
        settings: of the server.
        backend: the deployment.
        meter: counts requests.
        registry: has what the meter counts.
    """

    def __init__(self, settings: HttpSettings, backend: Backend, meter: Meter, registry: CollectorRegistry) -> None:
        self.settings, self.backend, self.meter, self.registry = settings, backend, meter, registry

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The body of a request; see `read_body`."""
        return await read_body(request, model, self.settings.body_bytes)

    async def generate(self, request: Request, call: Call, route: str) -> list[Piece]:
        """Every answer in full.

        Args:
            request: whose client waits.
            call: what it asks for.
            route: for the metrics.

        Raises:
            ApiError: the call has failed.
            ClientGoneError: the client has hung up, and the call was cancelled.
        """
        measured = self.meter.begin(route)
        status = 500
        try:
            answers = await while_connected(request, self.backend.generate(call))
            measured.add_answers(answers)
            status = 200
        except (ApiError, ClientGoneError) as error:
            status = _status_of(error)
            raise
        finally:
            measured.end(status)
        return answers

    async def stream(self, request: Request, call: Call, route: str, frames: EventFrames) -> Response:
        """The answers as they come, as events.

        What goes wrong before the first of them has a status of its own; the stream begins with the first.

        Args:
            frames: makes events of what comes.
            request, call, route: see `generate`.

        Raises:
            ApiError, ClientGoneError: see `generate`.
        """
        measured = self.meter.begin(route)
        replies = self.backend.stream(call)
        try:
            first = await while_connected(request, _next(replies))
        except BaseException as error:
            await replies.aclose()
            measured.end(_status_of(error))
            raise
        return EventStream(_events(first, replies, frames, measured), measured.end)


async def _next(replies: AsyncGenerator[Sequence[Piece], None]) -> Sequence[Piece]:
    """The first reply; none where there is nothing to answer."""
    async for pieces in replies:
        return pieces
    return ()


async def _events(
    first: Sequence[Piece],
    replies: AsyncGenerator[Sequence[Piece], None],
    frames: EventFrames,
    measured: Measured,
) -> AsyncGenerator[bytes, None]:
    async with aclosing(replies):
        measured.add(first)
        yield frames.opening() + frames.pieces(first)
        async for pieces in replies:
            measured.add(pieces)
            events = frames.pieces(pieces)
            if events:
                yield events
        yield frames.closing() + DONE


def json_response(content: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with JSON."""
    return Response(_encode(content), headers=headers, media_type="application/json")


def _status_of(error: BaseException) -> int:
    if isinstance(error, ApiError):
        return error.status
    return CLIENT_GONE if isinstance(error, ClientGoneError) else 500
