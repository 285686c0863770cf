"""`Multiplex` between processes of one machine, over a unix socket instead of gRPC.

gRPC's threads wake one another several times for each message, at both ends; here the event loop that waits for it is
woken once. While few answers run, that is most of the time that a token is under way.

A message travels behind its length, in four bytes. An empty one asks whether the other end is there, and comes back:
a process that is stopped, and not dead, closes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mii.grpc_related.options import MAX_MESSAGE_BYTES
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage
from mii.grpc_related.trunk import ended_call

__all__ = ["LocalCall", "LocalServer", "LocalStream", "nearest"]

_LENGTH_BYTES = 4
# Of the kernel, half of which goes into keeping the books. When it is full `write` waits, and what comes meanwhile is
# merged, see `Multiplexer`: the less is under way to a slow reader, the fewer messages it gets.
_ROOM_BYTES = 32768
# Messages that wait at the receiving end before it reads no further.
_MOST_UNREAD = 4
_LOST = "the connection is lost"


class _End(asyncio.Protocol):
    """One end of a connection.

    Args:
        answers: whether it sends empty messages back.
        on_open: told when it is connected.
        take: offered each message in the moment in which it comes, unless others wait; those that it does not take, and
            returns False for, wait for `read`.
    """

    def __init__(
        self,
        answers: bool,
        on_open: Callable[[_End], object] = lambda end: None,
        take: Callable[[bytes], bool] = lambda message: False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers, self._on_open, self._take = answers, on_open, take
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unread: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._paused = False
        self.ended = False
        self.heard_at = self._loop.time()
        """When something came last."""

    @property
    def behind(self) -> bool:
        """Whether messages wait to be read."""
        return bool(self._unread)

    async def read(self) -> bytes | None:
        """The next message; None when the other end has closed and there are no more."""
        while not self._unread:
            if self.ended:
                return None
            self._reader = self._loop.create_future()
            await self._reader
        message = self._unread.popleft()
        if self._paused and not self._unread and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return message

    async def write(self, message: bytes) -> None:
        """Sends a message, and returns when there is room for the next one.

        Raises:
            grpc.aio.AioRpcError: the other end is gone.
        """
        self.send(message)
        await self._room.wait()

    def send(self, message: bytes) -> None:
        """As `write`, and does not wait."""
        if self.ended or self._transport is None:
            raise ended_call(grpc.StatusCode.UNAVAILABLE, _LOST)
        self._transport.write(len(message).to_bytes(_LENGTH_BYTES, "little") + message)

    def close(self) -> None:
        """What was written goes out first."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Now."""
        if self._transport is not None:
            self._transport.abort()

    # What the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM_BYTES)
        self._on_open(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self._room.set()
        self._wake()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self._received += data
        while (message := self._cut()) is not None:
            if message:
                if self._unread or not self._take(message):
                    self._unread.append(message)
            elif self._answers and not self.ended:
                self.send(b"")
        if self._unread:
            self._wake()
        if len(self._unread) > _MOST_UNREAD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _cut(self) -> bytes | None:
        """A whole message off what was received; None: there is none."""
        size = int.from_bytes(self._received[:_LENGTH_BYTES], "little")
        if size > MAX_MESSAGE_BYTES:
            self.abort()
            return None
        end = _LENGTH_BYTES + size
        if len(self._received) < end:
            return None
        message = bytes(self._received[_LENGTH_BYTES:end])
        del self._received[:end]
        return message

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class LocalCall:
    """The caller's side, with what `Trunk` uses of a call of grpc.aio. Begins to connect at once.

    Args:
        path: of the server's socket.
        silence_seconds: a server that has not said a word for so long is gone.
    """

    def __init__(self, path: Path, silence_seconds: float) -> None:
        self._path, self._silence = path, silence_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._take: Callable[[bytes], bool] = lambda message: False
        self._opening = asyncio.ensure_future(self._open())

    def listen(self, take: Callable[[bytes], bool]) -> None:
        """Has each message offered to `take`, which must not wait, in the moment in which it comes. Those for which it
        returns False, and what comes while one of them waits, are there to `read`. For the moment in which it is made.
        """
        self._take = take

    async def read(self) -> Any:
        """The next message; `grpc.aio.EOF` after the last.

        Raises:
            grpc.aio.AioRpcError: the server is not there.
        """
        message = await (await self._end()).read()
        return grpc.aio.EOF if message is None else message

    async def write(self, message: bytes) -> None:
        """Sends a message, and returns when there is room for the next one.

        Raises:
            grpc.aio.AioRpcError: the server is not there.
        """
        await (await self._end()).write(message)

    def cancel(self) -> None:
        """Closes the connection."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._opening.done():
            self._opening.cancel()
        elif not self._opening.cancelled() and self._opening.exception() is None:
            self._opening.result().abort()

    async def _open(self) -> _End:
        loop = asyncio.get_running_loop()
        _, end = await loop.create_unix_connection(lambda: _End(answers=False, take=self._take), str(self._path))
        self._timer = loop.call_later(self._silence / 3, self._look, end)
        return end

    async def _end(self) -> _End:
        try:
            return await asyncio.shield(self._opening)
        except OSError as error:
            raise ended_call(grpc.StatusCode.UNAVAILABLE, f"{self._path} does not answer: {error}") from None

    def _look(self, end: _End) -> None:
        loop = asyncio.get_running_loop()
        if end.ended:
            return
        if end.behind:  # nobody reads here; what the server says comes later
            end.heard_at = loop.time()
        if loop.time() - end.heard_at > self._silence:
            end.abort()
            return
        end.send(b"")
        self._timer = loop.call_later(self._silence / 3, self._look, end)


class LocalStream:
    """The server's side of one caller's stream.

    Args:
        end: of its connection.
    """

    def __init__(self, end: _End) -> None:
        self._end = end
        self.write = end.write

    async def messages(self) -> AsyncIterator[CallerMessage]:
        """What the caller says, until it is gone or says what is no message."""
        with contextlib.suppress(DecodeError):
            while (message := await self._end.read()) is not None:
                yield CallerMessage.FromString(message)


class LocalServer:
    """Serves streams on a unix socket.

    Args:
        path: of the socket; whatever lies there is replaced.
        serve: serves one stream. When it returns, what it has written goes out and the stream ends.
    """

    def __init__(self, path: Path, serve: Callable[[LocalStream], Awaitable[None]]) -> None:
        self._path, self._serve = path, serve
        self._server: asyncio.AbstractServer | None = None
        self._streams: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens."""
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _End(answers=True, on_open=self._begin), str(self._path))

    async def wait_ended(self) -> None:
        """Sleeps until no stream is left."""
        while self._streams:
            await asyncio.wait(self._streams)

    async def stop(self) -> None:
        """Takes no more streams, and ends those that are left."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _begin(self, end: _End) -> None:
        stream = asyncio.ensure_future(self._run(end))
        self._streams.add(stream)
        stream.add_done_callback(self._streams.discard)

    async def _run(self, end: _End) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):  # the caller is gone
                await self._serve(LocalStream(end))
        finally:
            end.close()


def nearest(path: Path | None, method: Callable[[], Any], silence_seconds: float) -> Callable[[], Any]:
    """Opens streams the short way, where there is one, else over gRPC.

    Args:
        path: of the server's socket, if it is on this machine.
        method: `Multiplex` of the server, over gRPC.
        silence_seconds: see `LocalCall`.
    """

    def open_stream() -> Any:
        return method() if path is None or not path.exists() else LocalCall(path, silence_seconds)

    return open_stream
