"""What the routes of an HTTP server share: they ask the deployment, and its answers go out whole or as events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from mii.backend.bundled import BundledCall
from mii.entrypoints.http.backend import Backend, Call, Piece
from mii.entrypoints.http.bodies import ApiModel, read_body
from mii.entrypoints.http.errors import CLIENT_GONE, ApiError, api_error
from mii.entrypoints.http.metrics import Counts, Measured, Meter
from mii.entrypoints.http.settings import HttpSettings
from mii.entrypoints.http.streaming import DONE, ClientGoneError, EventStream, while_connected
from mii.errors import MIIError

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

    def closing(self, counts: Counts) -> bytes:
        """Events that come when everything has, and these are its tokens."""


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
            measured.counts.add(answers)
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
        events = _Events(self.backend.stream(call), frames, self.meter.begin(route))
        try:
            first = await while_connected(request, events.begin())
        except BaseException as error:
            await events.close(_status_of(error))
            raise
        return EventStream(first, events)


class _Events:
    """The events of one call's stream.

    Args:
        call: what they are about.
        frames: makes them.
        measured: counts.
    """

    def __init__(self, call: BundledCall, frames: EventFrames, measured: Measured) -> None:
        self._call, self._frames, self._measured = call, frames, measured
        self.over = False

    async def begin(self) -> bytes:
        """The first events, once there are some.

        Raises:
            ApiError: the call has failed before anything came.
        """
        try:
            pieces = await self._call.take()
        except MIIError as error:
            raise api_error(error) from error
        self._measured.begin()
        return self._frames.opening() + self.events(pieces)

    def take(self) -> bytes:
        try:
            pieces = self._call.take_now()
        except MIIError as error:
            raise api_error(error) from error
        events = self.events(pieces)
        if self._call.over and not self.over:
            self.over = True
            events += self._frames.closing(self._measured.counts) + DONE
        return events

    def listen(self, tell: Callable[[], object] | None, offer: Callable[[Any], bool] | None) -> None:
        self._call.listen(tell, offer)

    def events(self, offered: Sequence[Piece]) -> bytes:
        self._measured.counts.add(offered)
        return self._frames.pieces(offered)

    async def close(self, status: int) -> None:
        await self._call.close()
        self._measured.end(status)


def json_response(content: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with JSON."""
    return Response(_encode(content), headers=headers, media_type="application/json")


def _status_of(error: BaseException) -> int:
    if isinstance(error, ApiError):
        return error.status
    return CLIENT_GONE if isinstance(error, ClientGoneError) else 500
