"""The server's side of `Multiplex` at a replica: what is new of all calls goes out together, a few times a step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import grpc

from mii.errors import RequestError
from mii.grpc_related.generation import Generation
from mii.grpc_related.options import MAX_MESSAGE_BYTES
from mii.grpc_related.outlet import Outlet
from mii.grpc_related.proto.modelresponse_pb2 import (
    CallEnd,
    CallerMessage,
    CallStart,
    MultiStringRequest,
    ServerMessage,
)
from mii.grpc_related.statuses import status_of
from mii.grpc_related.trunk import MESSAGE_BYTES, end_of

__all__ = ["Calls", "Multiplexer"]

# One call's reply may have this many bytes, so that it never makes a message that is refused, with all that is in it.
_REPLY_BYTES = MAX_MESSAGE_BYTES // 2
# A step's tokens go out in so many messages, so that the processes behind this one work on the first while it makes the
# last. A message is about so many calls at least: one costs what a few tokens cost.
_MESSAGES_A_STEP = 2
_CALLS_A_MESSAGE = 8


@dataclass
class Calls:
    """What a `Multiplexer` does with the calls that it is given.

    Args:
        open: begins a call, and tells when there is something to write of it.
        close: ends one, whatever state it is in.
        write: what is new of a call, as a part of a ServerMessage that may be empty, given its number and for how many
            seconds it has run.
        ended: told of each call's status, its name, and the error that it ended with.
    """

    open: Callable[[MultiStringRequest, Callable[[], object]], Awaitable[Generation]]
    close: Callable[[Generation], object]
    write: Callable[[int, Generation, float], bytes]
    ended: Callable[[grpc.StatusCode, str, Exception | None], object]


@dataclass(eq=False)
class _Call:
    """One call: being opened by `task`, then running as `generation`."""

    name: str
    started: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    generation: Generation | None = None


class Multiplexer:
    """One stream of a caller, and the calls in it.

    Args:
        calls: does the work.
        send: writes a ServerMessage, and returns when there is room for the next one.
    """

    def __init__(self, calls: Calls, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._work = calls
        self._calls: dict[int, _Call] = {}
        self._fresh: dict[int, None] = {}
        self._ends: list[CallEnd] = []
        self._closing = False
        self._failure: Exception | None = None
        self._outlet = Outlet(self._collect, send, self._is_over)

    async def serve(self, messages: AsyncIterator[CallerMessage]) -> None:
        """Until the caller has ended its side or `finish` was called, and every call has ended.

        Raises:
            Exception: what `fail` was given.
        """
        reading = asyncio.ensure_future(self._read(messages))
        try:
            await self._outlet.run()
        finally:
            reading.cancel()
            self._cancel_all()
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Ends the stream once no call is left in it."""
        self._closing = True
        self._outlet.wake()

    def fail(self, error: Exception) -> None:
        """Ends every call at once, and the stream once the message that is being written is out."""
        self._failure = error
        self._cancel_all()
        self._outlet.wake()

    def _is_over(self) -> bool:
        return self._failure is not None or (self._closing and not self._calls and not self._ends)

    def _cancel_all(self) -> None:
        for number in list(self._calls):
            self._cancel(number)

    async def _read(self, messages: AsyncIterator[CallerMessage]) -> None:
        try:
            async for message in messages:
                if self._failure is not None:
                    return
                for start in message.starts:
                    self._start(start)
                for number in message.cancels:
                    self._cancel(number)
        finally:
            self.finish()

    def _start(self, start: CallStart) -> None:
        call = self._calls[start.call] = _Call(start.request_id)
        call.task = asyncio.ensure_future(self._open(start, call))

    async def _open(self, start: CallStart, call: _Call) -> None:
        try:
            request = MultiStringRequest.FromString(start.request)
            call.generation = await self._work.open(request, partial(self._tell, start.call))
            if call.generation.ended:  # it has no prompts
                self._tell(start.call)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._end(start.call, error)

    def _tell(self, number: int) -> None:
        """There is something to collect of a call."""
        if not self._fresh:
            self._outlet.wake()
        self._fresh[number] = None
        if len(self._fresh) >= max(_CALLS_A_MESSAGE, len(self._calls) // _MESSAGES_A_STEP):
            self._outlet.flush()

    def _cancel(self, number: int) -> None:
        call = self._calls.pop(number, None)
        if call is None:
            return
        if call.task is not None:
            call.task.cancel()
        if call.generation is not None:
            self._work.close(call.generation)
        self._work.ended(grpc.StatusCode.CANCELLED, call.name, None)

    def _end(self, number: int, error: Exception | None = None) -> None:
        """Says that a call has ended, well or with an error."""
        call = self._calls.pop(number)
        if call.generation is not None:
            self._work.close(call.generation)
        code, details, metadata = (grpc.StatusCode.OK, "", ()) if error is None else status_of(error)
        self._ends.append(end_of(number, code, details, metadata))
        self._outlet.wake()
        self._work.ended(code, call.name, error)

    def _collect(self) -> bytes:
        """What is new, up to a size, in one message."""
        if self._failure is not None:
            return b""
        parts: list[bytes] = []
        size, now = 0, time.monotonic()
        fresh, self._fresh = self._fresh, {}
        for place, number in enumerate(fresh):
            if size >= MESSAGE_BYTES:
                self._fresh = {**dict.fromkeys(list(fresh)[place:]), **self._fresh}
                break
            call = self._calls.get(number)
            if call is not None and call.generation is not None:
                reply = self._reply(number, call, call.generation, now)
                parts.append(reply)
                size += len(reply)
        if self._ends:
            ends, self._ends = self._ends, []
            parts.append(ServerMessage(ends=ends).SerializeToString())
        return b"".join(parts)

    def _reply(self, number: int, call: _Call, generation: Generation, now: float) -> bytes:
        """What is new of a call."""
        try:
            reply = self._work.write(number, generation, now - call.started)
            if len(reply) > _REPLY_BYTES:
                raise RequestError(f"{len(reply)} bytes are too many for one message; ask for fewer log-probabilities")
        except Exception as error:
            self._end(number, error)
            return b""
        if generation.ended:
            self._end(number)
        return reply
