"""HTTP/1.1 for a load generator: a connection whose answers are handed on as they arrive, with the time.

An answer's parts go from the socket through a parser in C to a callback, with no task to wake in between.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

from mii.benchmark.serving.trace import Failed

__all__ = ["Answer", "Connections"]

OnData = Callable[[bytes, float], None]
_LONGEST_ERROR = 2000  # bytes of an error's body that are kept
_CLOSED = "the server closed it before the answer's end"


class Answer:
    """One answer on its way.

    Args:
        on_data: called with each part of the body of a 200, and when it came.
    """

    def __init__(self, on_data: OnData) -> None:
        self.on_data = on_data
        self.status = 0
        self.error = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, data: bytes, now: float) -> None:
        if self.status == 200:
            self.on_data(data, now)
        else:
            self.error = (self.error + data)[:_LONGEST_ERROR]

    def end(self, failure: Failed | None = None) -> None:
        if self.done.done():
            return
        if failure is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(failure)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._now = 0.0
        self._until_end = False
        self.usable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._answer is None:
            return
        if self._until_end and error is None:  # the end of the connection is that of the answer
            self._finish()
        else:
            self._answer.end(Failed("connection lost", str(error or _CLOSED)))

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        answer = self._answer
        if answer is None:  # nothing was asked: the server hangs up
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self.close()
            failure = error.__context__
            answer.end(failure if isinstance(failure, Failed) else Failed("broken answer", repr(failure)))
        except httptools.HttpParserError as error:
            self.close()
            answer.end(Failed("broken answer", f"this is no HTTP answer: {error}"))

    def send(self, data: bytes, answer: Answer) -> None:
        """Sends a request, whose answer goes to `answer`."""
        assert self._transport is not None
        self._answer = answer
        self._transport.write(data)

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # What the parser finds

    def on_message_begin(self) -> None:
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._framed = self._framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()
        self._until_end = not self._framed

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.add(data, self._now)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status >= 200:  # others only say that one is on its way
            self._finish()

    def _finish(self) -> None:
        answer, self._answer = self._answer, None
        if self._until_end or not self._parser.should_keep_alive():
            self.close()
        if answer is not None:
            answer.end()


class Connections:
    """Connections to one server, kept for the next request when they are free.

    Args:
        url: that requests are posted to.
        headers: of every request, besides those that HTTP wants.

    Raises:
        ValueError: it is no http or https URL.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL of a server; give one such as http://localhost:28080/v1/completions")
        self._host, self._tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        named = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), ""]
        self._head = "\r\n".join(lines).encode("latin-1")
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def post(self, body: bytes, on_data: OnData, timeout: float) -> None:
        """Sends a body and hands on the answer's, until its end.

        Raises:
            Failed: the answer is no 200, is not complete, or did not come in time.
        """
        connection, used = await self._connection()
        answer = Answer(on_data)
        try:
            connection.send(self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body, answer)
            await asyncio.wait_for(answer.done, timeout)
        except asyncio.TimeoutError:
            raise Failed("timeout", f"the answer was not complete after {timeout:g} s") from None
        except Failed as failure:
            if used and not answer.status and failure.kind == "connection lost":
                # It had lain idle and the server closed it just then; nobody saw the request.
                await self.post(body, on_data, timeout)
                return
            raise
        finally:
            self._give_back(connection, answer)
        if answer.status != 200:
            raise Failed(f"HTTP {answer.status}", answer.error.decode("utf-8", "replace"))

    def close(self) -> None:
        """Closes all of them."""
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._free.clear()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection, True
            self._all.discard(connection)
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise Failed("no connection", str(error)) from None
        self._all.add(made)
        return made, False

    def _give_back(self, connection: _Connection, answer: Answer) -> None:
        if connection.usable and answer.done.done() and not answer.done.cancelled():
            self._free.append(connection)
        else:
            connection.close()
            self._all.discard(connection)
