"""`DeploymentClient`: the connections to a deployment, how it is, its number of replicas and its end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from google.protobuf.empty_pb2 import Empty

from mii.backend import channels
from mii.backend.calls import Attempts, unary, unary_async
from mii.backend.channels import AsyncConnection
from mii.backend.own_loop import OwnLoop
from mii.backend.replies import health_of
from mii.config import MIIConfig
from mii.errors import (
    DeploymentNotFoundError,
    RequestTimeoutError,
    ServerUnavailableError,
    ServingError,
    UnsupportedFeatureError,
)
from mii.grpc_related.options import TOKEN
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub

__all__ = ["DeploymentClient"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "*")
_LOOK_SECONDS = 0.1
_HEALTH_SECONDS = 10.0


class DeploymentClient:
    """Connects to a deployment and looks after it. `MIIClient`, whose arguments these are, asks it for text as well."""

    def __init__(self, mii_config: MIIConfig, host: str, token: str | None) -> None:
        self.mii_config = mii_config
        self.task = mii_config.model_conf.task
        self.host, self.port = host, mii_config.port_number
        reachable = host
        if host in _LOOPBACK:  # the deployment may listen on another address of this machine only
            reachable = "127.0.0.1" if mii_config.host in (*_EVERYWHERE, *_LOOPBACK[:2]) else mii_config.host
        self.address = channels.address_of(reachable, self.port)
        """``host:port`` of the deployment."""
        self._token = token
        self._closed = False
        self._own_loop = OwnLoop()
        channels.join(self.address, self)

    @property
    def asyncio_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of `stub`: the one that runs here or, where none does, one that the client keeps for this and
        makes the current one of this thread.
        """
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            self._check_open()
            return self._own_loop.get()

    @property
    def stub(self) -> ModelResponseStub:
        """gRPC's own asynchronous stub, for programs that make the calls of the proto themselves, in `asyncio_loop`.

        Example:
            client.asyncio_loop.run_until_complete(client.stub.Health(Empty()))
        """
        loop = self.asyncio_loop
        return (self._async_connection() if loop.is_running() else loop.run_until_complete(self._connect())).stub

    # The deployment

    def health(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """What the deployment says when its engines are asked.

        Returns:
            "ready": whether it can answer requests; "reason": why not; "replicas": the same for each, with its address,
            limits, device and the prompts that it has.

        Raises:
            ServerUnavailableError: it does not answer.
            RequestTimeoutError: nor within `timeout` seconds.
        """
        return health_of(unary(self._stub().Health, Empty(), self._attempts(timeout)))

    async def health_async(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """As `health`, in an event loop."""
        return health_of(await unary_async(self._async_connection().stub.Health, Empty(), self._attempts(timeout)))

    def stats(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """What the deployment counts: "balancer", and "replicas" with an entry for each."""
        return dict(json.loads(unary(self._stub().Stats, Empty(), self._attempts(timeout)).json))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the deployment can answer requests.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            RequestTimeoutError: it was not ready in time; says what it was waiting for.
            ServerUnavailableError: it has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _HEALTH_SECONDS if deadline is None else min(_HEALTH_SECONDS, deadline - time.monotonic())
            reason = self._not_ready(max(left, _LOOK_SECONDS))
            if reason is None:
                return
            if deadline is not None and time.monotonic() + _LOOK_SECONDS > deadline:
                raise RequestTimeoutError(f"{self._where()} was not ready within {timeout:g} s: {reason}")
            time.sleep(_LOOK_SECONDS)

    def scale(self, replicas: int, *, device_map: Any = None, progress: bool | None = False) -> None:
        """Gives the deployment another number of replicas, and returns when it has them.

        New ones come on devices that are free. The last ones go: they get no more requests, and what they have may end
        within the config's `drain_seconds`. On the deployment's machine only.

        Args:
            replicas: how many it is to have, from 1 up.
            device_map: devices of those that are added, as `mii.serve` takes them; None: those that are free.
            progress: as in `mii.serve`.

        Raises:
            PlacementError: fewer than one, or more than there are devices for.
            DeploymentError: it cannot be changed now, or a new replica did not start; then it has those that it had.
            UnsupportedFeatureError: the deployment runs on another machine.
        """
        if not self._is_registered():
            raise UnsupportedFeatureError(f"{self._where()} is on another machine; use 'mii scale' there")
        from mii.backend.scaling import scale

        self.mii_config = scale(self.mii_config.deployment_name, replicas, device_map=device_map, progress=progress)

    def terminate_server(self) -> None:
        """Ends the deployment; what runs may finish first, for the config's `drain_seconds`.

        On this machine it returns when nothing of the deployment is left. On another one it needs the deployment's
        token and returns when the deployment has begun to end.

        Raises:
            DeploymentNotFoundError: there is none.
            AccessError: the token is missing or wrong.
            ServerUnavailableError: the deployment does not answer.
        """
        if self._is_registered():
            from mii.backend.deployment import stop

            stop(self.mii_config.deployment_name)
        else:
            metadata = ((TOKEN, self._token or ""),)
            unary(self._stub().Terminate, Empty(), self._attempts(_HEALTH_SECONDS), metadata)
        self.close()

    async def terminate_async(self) -> None:
        """As `terminate_server`, in an event loop."""
        if self._is_registered():
            from mii.backend.deployment import stop

            await asyncio.to_thread(stop, self.mii_config.deployment_name)
        else:
            metadata = ((TOKEN, self._token or ""),)
            await unary_async(
                self._async_connection().stub.Terminate, Empty(), self._attempts(_HEALTH_SECONDS), metadata
            )
        await self.close_async()

    # Life

    def close(self) -> None:
        """Lets go of the connection, which closes when no other client uses it; twice is fine."""
        self._closed = True
        self._own_loop.close()
        channels.leave(self.address, self)

    async def close_async(self) -> None:
        """As `close`, and waits for it."""
        self._closed = True
        self._own_loop.close()
        await channels.leave_async(self.address, self)

    # Within

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(timeout, self._ended, self._where())

    def _stub(self) -> Any:
        self._check_open()
        return channels.stub(self.address)

    def _async_connection(self) -> AsyncConnection:
        self._check_open()
        return channels.async_connection(self.address)

    async def _connect(self) -> AsyncConnection:
        return self._async_connection()

    def _check_open(self) -> None:
        if self._closed:
            raise ServingError(f"{self!r} is closed; make another one with mii.client(...)")

    def _where(self) -> str:
        return f"deployment {self.mii_config.deployment_name!r} at {self.address}"

    def _is_registered(self) -> bool:
        """Whether the deployment that this client talks to is one that this user runs on this machine."""
        if self.host not in (*_LOOPBACK, self.mii_config.host):
            return False
        from mii.config import get_mii_config

        try:
            return get_mii_config(self.mii_config.deployment_name).port_number == self.port
        except DeploymentNotFoundError:
            return False

    def _ended(self) -> str | None:
        """Why nobody can be there, as far as it can be known."""
        from mii.backend.deployment import find_alive

        if not self._is_registered():
            return None
        try:
            find_alive(self.mii_config.deployment_name)
        except DeploymentNotFoundError as error:
            return str(error)
        return None

    def _not_ready(self, timeout: float) -> str | None:
        """Why the deployment cannot answer requests yet; None: it can."""
        try:
            health = self.health(timeout)
        except RequestTimeoutError as error:
            return str(error)
        except ServerUnavailableError as error:
            if self._ended():
                raise
            return str(error)
        return None if health["ready"] else health["reason"] or "it does not say why"
