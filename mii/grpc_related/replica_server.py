"""The gRPC server of one replica: its service, the standard health and reflection services, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from mii.errors import PortTakenError, ServerUnavailableError
from mii.grpc_related.local_stream import LocalServer
from mii.grpc_related.options import SERVER_OPTIONS, SERVICE_NAME
from mii.grpc_related.replica_service import STALL_SECONDS, ReplicaService
from mii.grpc_related.text_session import TextSession
from mii.launch.folder import DeploymentFolder

__all__ = ["ReplicaServer"]

# Calls beyond the queue that may be open: those whose answers are read late, and those that ask for the health.
_MORE_CALLS = 1024
_LAST_WORDS_SECONDS = 1.0


class ReplicaServer:
    """Serves a `TextSession`. Made within a running event loop.

    Args:
        session: what the calls share; it is the server's from now on.
        queue_size: see `TextSession`.
        token: see `ReplicaService`.
        terminate: see `ReplicaService`.
        stall_seconds: see `ReplicaService`.
        folder: of the deployment, where processes of this machine meet; None: they speak gRPC.
    """

    def __init__(
        self,
        session: TextSession,
        *,
        queue_size: int,
        token: str,
        terminate: Callable[[str], None],
        stall_seconds: float = STALL_SECONDS,
        folder: DeploymentFolder | None = None,
    ) -> None:
        self._folder = folder
        self._local: LocalServer | None = None
        self._session = session
        self._service = ReplicaService(session, token, terminate, stall_seconds=stall_seconds)
        self._health = health.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=queue_size + _MORE_CALLS)
        self._server.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME), self._server)
        session.on_state = self._on_state
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listens and begins to connect to the engine. Returns the port.

        Args:
            host: address to listen on.
            port: 0 takes any that is free.

        Raises:
            PortTakenError: the port cannot be listened on.
        """
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise PortTakenError(f"port {port} of {host} cannot be listened on: {error}") from error
        await self._set_health(False)
        await self._server.start()
        if self._folder is not None:
            self._local = LocalServer(self._folder.front_socket(bound), self._service.serve_local)
            await self._local.start()
        self._session.start()
        self._run(self._service.watch())
        return int(bound)

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new calls, lets those that run end, and ends the rest after `drain_seconds`."""
        self._service.drain()
        await self._set_health(False)
        stopped = asyncio.create_task(self._server.stop(drain_seconds + _LAST_WORDS_SECONDS))
        ends = [stopped] if self._local is None else [stopped, asyncio.create_task(self._local.wait_ended())]
        await asyncio.wait(ends, timeout=drain_seconds)
        self._session.fail_all(ServerUnavailableError("the server is shutting down; what ran was given time to end"))
        await stopped
        if self._local is not None:
            await asyncio.wait(ends, timeout=_LAST_WORDS_SECONDS)
            await self._local.stop()
        for task in self._tasks:
            task.cancel()
        await self._session.close()

    def _on_state(self, ready: bool) -> None:
        self._run(self._set_health(ready and not self._service.draining))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)
