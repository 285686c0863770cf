"""The caller's side of `Multiplex`: one stream to a server that carries many calls.

A gRPC message costs tens of microseconds at each end, however little is in it. Where hundreds of answers come at once,
one message for all that is new of them costs little more than a message for one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from mii.grpc_related.proto.modelresponse_pb2 import (
    CallEnd,
    CallerMessage,
    CallStart,
    ServerMessage,
    SingleGenerationReply,
)

__all__ = ["MESSAGE_BYTES", "Bundle", "Trunk", "end_of", "ended_call", "error_of_end"]

MESSAGE_BYTES = 4 << 20
"""A message of many calls grows no further than by one more call from here on."""
Deliver = Callable[[bytes, ServerMessage], object]


class Trunk:
    """Calls over one stream, which is opened by the first of them, and anew by the first after it was lost.

    Args:
        method: `Multiplex` of a server, with bytes both ways.
        deliver: takes in each message, and must not wait.
        room: set while messages may come; what comes at other times waits in the connection. None: they always may.
    """

    def __init__(self, method: Any, deliver: Deliver, room: asyncio.Event | None = None) -> None:
        self._method, self._deliver, self._room = method, deliver, room
        self._stream: _Stream | None = None

    async def run(self, start: CallStart) -> None:
        """Makes a call, and returns when it has ended well. Whoever is cancelled while this waits cancels the call.

        Raises:
            grpc.aio.AioRpcError: it has not; or the stream is lost.
        """
        if self._stream is None or self._stream.lost:
            self._stream = _Stream(self._method(), self._deliver, self._room)
        await self._stream.run(start)

    async def close(self) -> None:
        """Ends the stream, and with it every call."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()


class Bundle:
    """Calls over one `Trunk`, each of which is told what comes for it.

    Args:
        method: see `Trunk`.
        lasting: whether the stream stays open while no call is in it; else nothing is left when the last one has ended.
    """

    def __init__(self, method: Any, *, lasting: bool = True) -> None:
        self._trunk, self._lasting = Trunk(method, self._deliver), lasting
        self._numbers = itertools.count(1)
        self._takers: dict[int, Callable[[Sequence[SingleGenerationReply]], object]] = {}

    async def run(self, request: bytes, name: str, take: Callable[[Sequence[SingleGenerationReply]], object]) -> None:
        """Makes a call; see `Trunk.run`.

        Args:
            request: a MultiStringRequest.
            name: of the call, for logs.
            take: gets the pieces as they come, and must not wait.
        """
        start = CallStart(call=next(self._numbers), request=request, request_id=name)
        self._takers[start.call] = take
        try:
            await self._trunk.run(start)
        finally:
            del self._takers[start.call]
            if not self._lasting and not self._takers:
                await self.close()

    async def close(self) -> None:
        """Ends every call that still runs."""
        await self._trunk.close()

    def _deliver(self, raw: bytes, message: ServerMessage) -> None:
        fresh: dict[int, list[SingleGenerationReply]] = {}
        for reply in message.replies:
            call = reply.call
            # A server that could not send for a while says several things of a call in one message.
            fresh[call] = [*fresh[call], *reply.response] if call in fresh else list(reply.response)
        for call, pieces in fresh.items():
            take = self._takers.get(call)
            if take is not None:
                take(pieces)


class _Stream:
    def __init__(self, call: Any, deliver: Deliver, room: asyncio.Event | None) -> None:
        self._call, self._deliver, self._room = call, deliver, room
        self._behind = False
        self._ends: dict[int, asyncio.Future[CallEnd]] = {}
        self._starts: deque[CallStart] = deque()
        self._cancels: list[int] = []
        self._something = asyncio.Event()
        self.lost = False
        if hasattr(call, "listen"):  # a socket, where a message can be taken in the moment in which it comes
            call.listen(self._take_now)
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())]

    async def run(self, start: CallStart) -> None:
        ended = self._ends[start.call] = asyncio.get_running_loop().create_future()
        self._starts.append(start)
        self._something.set()
        try:
            end = await ended
        except asyncio.CancelledError:
            self._cancels.append(start.call)
            self._something.set()
            raise
        finally:
            self._ends.pop(start.call, None)
        if end.code:
            raise error_of_end(end)

    async def close(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        failure = _lost("the server has ended the stream")
        try:
            while (raw := await self._call.read()) is not grpc.aio.EOF:
                if self._room is not None:
                    self._behind = True
                    await self._room.wait()
                    self._behind = False
                self._take_in(raw)
        except grpc.aio.AioRpcError as error:
            # Where a write finds the connection lost before this does, gRPC calls that an internal error.
            failure = _lost("the connection is lost") if error.code() is grpc.StatusCode.INTERNAL else error
        finally:
            self._lose(failure)

    def _take_now(self, raw: bytes) -> bool:
        """Takes in a message, unless it has to wait for room or for one that does."""
        if self._behind or not (self._room is None or self._room.is_set()):
            return False
        self._take_in(raw)
        return True

    def _take_in(self, raw: bytes) -> None:
        message = ServerMessage.FromString(raw)
        self._deliver(raw, message)
        for end in message.ends:
            ended = self._ends.get(end.call)
            if ended is not None and not ended.done():
                ended.set_result(end)

    async def _write(self) -> None:
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                while self._starts or self._cancels:
                    await self._call.write(self._take().SerializeToString())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            """The reader finds out why, and says so."""

    def _take(self) -> CallerMessage:
        """What is to be said, up to a size. A call's start goes out before its cancellation."""
        message, size = CallerMessage(), 0
        while self._starts and size < MESSAGE_BYTES:
            size += len(self._starts[0].request)
            message.starts.append(self._starts.popleft())
        if not self._starts:
            message.cancels.extend(self._cancels)
            self._cancels.clear()
        return message

    def _lose(self, failure: grpc.aio.AioRpcError) -> None:
        self.lost = True
        self._tasks[1].cancel()
        self._call.cancel()
        for ended in self._ends.values():
            if not ended.done():
                ended.set_exception(failure)


def end_of(call: int, code: grpc.StatusCode, details: str, metadata: Any) -> CallEnd:
    """The end of a call as it travels.

    Args:
        call: its number.
        code, details, metadata: its status.
    """
    return CallEnd(call=call, code=code.value[0], details=details, metadata=dict(metadata))


def error_of_end(end: CallEnd) -> grpc.aio.AioRpcError:
    """What a gRPC call of its own would have raised."""
    metadata = grpc.aio.Metadata(*end.metadata.items())
    return grpc.aio.AioRpcError(_CODES[end.code], grpc.aio.Metadata(), metadata, details=end.details)


def ended_call(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """The end of a call that nobody but this side knows of."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


def _lost(details: str) -> grpc.aio.AioRpcError:
    return ended_call(grpc.StatusCode.UNAVAILABLE, details)


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
