"""The connections of this process: one for each address, and for asyncio one for each address and event loop.

A client is made for every request by some programs, so clients share connections, and one that is made anew finds the
connection that is there. A forked process makes its own: a connection of its parent does not work in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from dataclasses import dataclass

import grpc
import grpc.aio

from mii.errors import ServingError
from mii.grpc_related.options import CHANNEL_OPTIONS, SERVICE_NAME
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.trunk import Bundle

__all__ = ["AsyncConnection", "address_of", "async_connection", "close_loop", "join", "leave", "leave_async", "stub"]

# A program that talks to more servers than this one after the other has their oldest connections closed.
_MOST_ADDRESSES = 64


def address_of(host: str, port: int) -> str:
    """``host:port`` as gRPC takes it."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


@dataclass(frozen=True)
class AsyncConnection:
    """A connection of one event loop.

    Args:
        loop: it is of use here only.
        channel: what is closed.
        stub: makes calls.
        bundle: makes calls whose answers are streamed, all in one stream.
    """

    loop: asyncio.AbstractEventLoop
    channel: grpc.aio.Channel
    stub: ModelResponseStub
    bundle: Bundle

    async def close(self) -> None:
        """Ends every call that still runs."""
        await self.bundle.close()
        await self.channel.close()


class _Connections:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sync: dict[str, tuple[grpc.Channel, ModelResponseStub]] = {}
        self.asynchronous: dict[tuple[str, int], AsyncConnection] = {}
        self.users: dict[str, weakref.WeakSet[object]] = {}
        self.used_async = False
        self.parent_used_async = False


_connections = _Connections()
_inherited: list[_Connections] = []  # never touched again: their destructors would wait for threads of the parent


def _forget_parents() -> None:
    global _connections
    parents = _connections
    _inherited.append(parents)
    _connections = _Connections()
    _connections.parent_used_async = parents.used_async or parents.parent_used_async


os.register_at_fork(after_in_child=_forget_parents)


def join(address: str, user: object) -> None:
    """Says that `user` may talk to `address`, until it leaves or is collected."""
    with _connections.lock:
        _connections.users.setdefault(address, weakref.WeakSet()).add(user)


def stub(address: str) -> ModelResponseStub:
    """The synchronous stub for an address, for any thread."""
    found = _connections.sync.get(address)
    if found is None:
        with _connections.lock:
            found = _connections.sync.get(address)
            if found is None:
                _evict(_connections)
                channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
                found = _connections.sync[address] = channel, ModelResponseStub(channel)
    return found[1]


def async_connection(address: str) -> AsyncConnection:
    """The connection to an address for the event loop that runs.

    Raises:
        ServingError: gRPC's part for event loops was in use when this process was forked; it does not survive that.
    """
    if _connections.parent_used_async:
        raise ServingError(
            "this process was forked from one that had made asynchronous calls, so it can make synchronous ones only; "
            "start it with multiprocessing's 'spawn' method, or fork before the first asynchronous call"
        )
    _connections.used_async = True
    loop = asyncio.get_running_loop()
    found = _connections.asynchronous.get((address, id(loop)))
    if found is None or found.loop is not loop:
        with _connections.lock:
            for key, other in list(_connections.asynchronous.items()):
                if other.loop.is_closed():
                    del _connections.asynchronous[key]
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            bundle = Bundle(channel.stream_stream(f"/{SERVICE_NAME}/Multiplex"), lasting=False)
            found = AsyncConnection(loop, channel, ModelResponseStub(channel), bundle)
            _connections.asynchronous[address, id(loop)] = found
    return found


def leave(address: str, user: object) -> None:
    """The last one who leaves closes the connections; what still runs over them is cancelled."""
    sync, asynchronous = _leave(address, user)
    if sync is not None:
        sync.close()
    for connection in asynchronous:
        _close_from_afar(connection)


async def leave_async(address: str, user: object) -> None:
    """As `leave`, and waits until the connections of the event loop that runs are closed."""
    running = asyncio.get_running_loop()
    sync, asynchronous = _leave(address, user)
    if sync is not None:
        sync.close()
    for connection in asynchronous:
        if connection.loop is running:
            await connection.close()
        else:
            _close_from_afar(connection)


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Closes the connections of an event loop that does not run, and the loop."""
    with _connections.lock:
        keys = [key for key, connection in _connections.asynchronous.items() if connection.loop is loop]
        its = [_connections.asynchronous.pop(key) for key in keys]
    for connection in its:
        loop.run_until_complete(connection.close())
    loop.close()


def _close_from_afar(connection: AsyncConnection) -> None:
    if not connection.loop.is_closed():
        with contextlib.suppress(RuntimeError):  # it was closed just now
            asyncio.run_coroutine_threadsafe(connection.close(), connection.loop)


def _leave(address: str, user: object) -> tuple[grpc.Channel | None, list[AsyncConnection]]:
    """Takes out what nobody uses any more."""
    with _connections.lock:
        users = _connections.users.get(address)
        if users is None:
            return None, []
        users.discard(user)
        if users:
            return None, []
        del _connections.users[address]
        sync = _connections.sync.pop(address, None)
        keys = [key for key in _connections.asynchronous if key[0] == address]
        asynchronous = [_connections.asynchronous.pop(key) for key in keys]
        return sync[0] if sync else None, asynchronous


def _evict(connections: _Connections) -> None:
    """Makes room for one more connection, at the cost of one that no client uses."""
    if len(connections.sync) < _MOST_ADDRESSES:
        return
    idle = next((address for address in connections.sync if not connections.users.get(address)), None)
    if idle is not None:
        connections.sync.pop(idle)[0].close()
        connections.users.pop(idle, None)
