"""`Multiplex` at the load balancer: the calls of one caller's stream, each carried by a stream to the replica that it
was given to. What replicas say passes through as it is; only the ends of calls are said by the load balancer, which may
have sent a call elsewhere first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from weakref import WeakKeyDictionary

import grpc

from mii.errors import RequestError, ServerUnavailableError
from mii.grpc_related.dispatch import Dispatcher, Shard
from mii.grpc_related.links import Link
from mii.grpc_related.outlet import Outlet
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage, CallStart, ServerMessage
from mii.grpc_related.statuses import Status
from mii.grpc_related.trunk import MESSAGE_BYTES, Trunk, end_of

__all__ = ["Switchboard"]


class Switchboard:
    """One stream of a caller, and the calls in it.

    Args:
        dispatcher: finds replicas.
        send: writes a message, and returns when there is room for the next one.
        status: what an error is for the caller.
        ended: told of each call's status.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        send: Callable[[bytes], Awaitable[None]],
        *,
        status: Callable[[Exception], Status],
        ended: Callable[[grpc.StatusCode], object],
    ) -> None:
        self._dispatcher, self._status, self._ended = dispatcher, status, ended
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._silent: dict[int, Shard] = {}  # the calls that replicas have, of which nothing has come yet
        self._trunks: WeakKeyDictionary[Link, Trunk] = WeakKeyDictionary()  # replicas may come and go
        self._outbox: deque[bytes] = deque()
        self._room = asyncio.Event()
        self._room.set()
        self._closing = False
        self._outlet = Outlet(self._take, send, lambda: self._closing and not self._calls and not self._outbox)

    async def serve(self, messages: AsyncIterator[CallerMessage]) -> None:
        """Until the caller has ended its side or `finish` was called, and every call has ended."""
        reading = asyncio.ensure_future(self._read(messages))
        try:
            await self._outlet.run()
        finally:
            reading.cancel()
            # A caller that is gone makes a write fail, and then gRPC cancels this too, which is here already.
            await asyncio.shield(self._close())

    def finish(self) -> None:
        """Ends the stream once no call is left in it."""
        self._closing = True
        self._outlet.wake()

    def fail_all(self, error: Exception) -> None:
        """Ends every call with an error."""
        for number, task in list(self._calls.items()):
            task.cancel()
            self._end(number, self._status(error))

    async def _close(self) -> None:
        """Ends every call, and then the streams to the replicas, which carry the news."""
        tasks = list(self._calls.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(trunk.close() for trunk in self._trunks.values()))

    async def _read(self, messages: AsyncIterator[CallerMessage]) -> None:
        try:
            async for message in messages:
                for start in message.starts:
                    self._calls[start.call] = asyncio.ensure_future(self._carry(start, self._closing))
                for number in message.cancels:
                    task = self._calls.pop(number, None)
                    if task is not None:
                        task.cancel()
                        self._ended(grpc.StatusCode.CANCELLED)
                        self._outlet.wake()
        finally:
            self.finish()

    async def _carry(self, start: CallStart, too_late: bool) -> None:
        """One call, from its prompt to its end."""
        try:
            if too_late:
                raise ServerUnavailableError("the deployment is shutting down")
            shards = await self._dispatcher.split(start.request)
            if len(shards[0].places) != 1 or len(shards) > 1:
                raise RequestError("a call in a stream of many has one prompt; make several calls")
            shard = self._silent[start.call] = shards[0]
            await self._dispatcher.carry(shard, partial(self._run, start), start.request_id or "without an id")
            self._end(start.call, (grpc.StatusCode.OK, "", ()))
        except Exception as error:
            self._end(start.call, self._status(error))
        finally:
            self._silent.pop(start.call, None)

    async def _run(self, start: CallStart, link: Link) -> None:
        trunk = self._trunks.get(link)
        if trunk is None:
            trunk = self._trunks[link] = Trunk(link.multiplex, self._deliver, self._room)
        await trunk.run(start)

    def _deliver(self, raw: bytes, message: ServerMessage) -> None:
        """Passes on what a replica says. It comes when nothing waits here: in the replica, what waits is merged."""
        if self._silent:
            for reply in message.replies:
                shard = self._silent.pop(reply.call, None)
                if shard is not None:
                    shard.sent = True
        if message.ends:
            raw = ServerMessage(replies=message.replies).SerializeToString()
        if raw:
            self._put(raw)

    def _end(self, number: int, status: Status) -> None:
        if self._calls.pop(number, None) is None:  # the caller has gone on
            return
        code, details, metadata = status
        self._put(ServerMessage(ends=[end_of(number, code, details, metadata)]).SerializeToString())
        self._ended(code)

    def _put(self, raw: bytes) -> None:
        self._outbox.append(raw)
        self._room.clear()
        self._outlet.wake()

    def _take(self) -> bytes:
        """What is to be said, up to a size, as one message: messages one after the other are their sum."""
        parts: list[bytes] = []
        size = 0
        while self._outbox and (not parts or size + len(self._outbox[0]) <= MESSAGE_BYTES):
            parts.append(self._outbox.popleft())
            size += len(parts[-1])
        if not self._outbox:
            self._room.set()
        return b"".join(parts)
