"""The server of the load balancer: its service, the standard health and reflection services, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from mii.errors import PortTakenError
from mii.grpc_related.links import Link
from mii.grpc_related.load_balancer import LoadBalancer
from mii.grpc_related.local_stream import LocalServer
from mii.grpc_related.options import SERVER_OPTIONS, SERVICE_NAME, STALL_SECONDS
from mii.launch.folder import DeploymentFolder

__all__ = ["BalancerServer"]

# Calls beyond the queues that may be open: those whose answers are read late, and those that ask for the health.
_MORE_CALLS = 1024
_LAST_WORDS_SECONDS = 1.0
_OTHERS_SECONDS, _LOOK_SECONDS = 3.0, 0.02
# gRPC's bound on open calls stays as it is made; replicas may be added later.
_REPLICAS_TO_COME = 64
# What was about to be sent over a connection finds it open for so long.
_LAST_CALLS_SECONDS = 1.0


class BalancerServer:
    """Serves a deployment's replicas. Made within a running event loop.

    Args:
        addresses: ``host:port`` of each replica's front.
        queue_size: prompts that one replica takes at once.
        token: see `LoadBalancer`.
        terminate: see `LoadBalancer`.
        stall_seconds: see `STALL_SECONDS`.
        folder: of the deployment, where processes of this machine meet; None: they speak gRPC.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        queue_size: int,
        token: str,
        terminate: Callable[[str], None],
        stall_seconds: float = STALL_SECONDS,
        folder: DeploymentFolder | None = None,
    ) -> None:
        self._queue_size, self._folder = queue_size, folder
        self._links = [self._link(index, address) for index, address in enumerate(addresses)]
        self._watches: dict[Link, asyncio.Task[None]] = {}
        self._service = LoadBalancer(self._links, token=token, terminate=terminate)
        self._local = None if folder is None else LocalServer(folder.calls_socket, self._service.serve_local)
        self._health = health.HealthServicer()
        most = queue_size * max(len(addresses), _REPLICAS_TO_COME) + _MORE_CALLS
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=most)
        self._server.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME), self._server)
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining, self._stall_seconds = False, stall_seconds
        self._first = asyncio.Event()

    async def start(self, address: str) -> int:
        """Listens, and begins to connect to the replicas. Returns the port.

        Args:
            address: ``host:port`` to listen on; port 0 takes any that is free.

        Raises:
            PortTakenError: it cannot be listened on.
        """
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortTakenError(f"{address} is in use, or is no address of this machine") from error
        await self._set_health(False)
        await self._server.start()
        if self._local is not None:
            await self._local.start()
        for link in self._links:
            self._watch(link)
        self._spawn(self._end_stalled())
        return int(port)

    def set_replicas(self, addresses: Sequence[str]) -> None:
        """Takes in which replicas there are now. New ones get calls once they can answer; those that are gone get no
        more, and what they have goes on.
        """
        for link in [link for link in self._links if link.address not in addresses]:
            self._links.remove(link)
            self._watches.pop(link).cancel()
            link.retire()
            self._service.on_removal(link)
            self._spawn(self._let_go(link))
        here = {link.address for link in self._links}
        for address in dict.fromkeys(addresses):
            if address not in here:
                taken = {link.index for link in self._links}
                index = next(number for number in range(len(taken) + 1) if number not in taken)
                self._links.append(self._link(index, address))
                self._watch(self._links[-1])
        self._links.sort(key=lambda link: link.index)
        self._tell_health()

    async def wait_all_ready(self) -> None:
        """Sleeps until every replica can answer, or for a moment: one that has just said so is reached at once."""
        deadline = time.monotonic() + _OTHERS_SECONDS
        while not all(link.ready for link in self._links) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)

    async def wait_ready(self) -> None:
        """Sleeps until a replica can answer, and a little longer for the others: they come up at the same time."""
        await self._first.wait()
        await self.wait_all_ready()

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new calls, lets those that run end, and ends the rest after `drain_seconds`."""
        self._draining = True
        self._service.drain()
        await self._set_health(False)
        stopped = asyncio.create_task(self._server.stop(drain_seconds + _LAST_WORDS_SECONDS))
        ends = [stopped] if self._local is None else [stopped, asyncio.create_task(self._local.wait_ended())]
        await asyncio.wait(ends, timeout=drain_seconds)
        self._service.end("the deployment is shutting down; what ran was given time to end")
        await stopped
        if self._local is not None:
            await asyncio.wait(ends, timeout=_LAST_WORDS_SECONDS)
            await self._local.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links))

    def _link(self, index: int, address: str) -> Link:
        host, _, port = address.rpartition(":")
        near = self._folder is not None and host == "127.0.0.1"
        socket = self._folder.front_socket(int(port)) if self._folder is not None and near else None
        return Link(index, address, self._queue_size, socket)

    def _on_change(self, link: Link) -> None:
        self._service.on_change(link)
        self._first.set()
        self._tell_health()

    def _watch(self, link: Link) -> None:
        self._watches[link] = self._spawn(link.watch(self._on_change))

    async def _let_go(self, link: Link) -> None:
        """Closes the connection to a replica that is gone, when nothing runs over it any more."""
        await asyncio.sleep(_LAST_CALLS_SECONDS)
        while link.prompts:
            await asyncio.sleep(_LOOK_SECONDS)
        await link.close()

    def _tell_health(self) -> None:
        self._spawn(self._set_health(any(link.ready for link in self._links) and not self._draining))

    async def _end_stalled(self) -> None:
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            self._service.end_stalled(self._stall_seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)
