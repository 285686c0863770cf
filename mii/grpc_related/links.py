"""The load balancer's connection to one replica: what it carries, and whether the replica is well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from mii.grpc_related.local_stream import nearest
from mii.grpc_related.options import CHANNEL_OPTIONS, SERVICE_NAME
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply, StatsReply
from mii.grpc_related.trunk import Bundle
from mii.logging import logger

__all__ = ["Link"]

_SILENCE_SECONDS = 9.0
_OPTIONS = {
    **dict(CHANNEL_OPTIONS),
    # As over the socket: a replica that is stopped and not dead is given up after so long, and its calls are told so.
    "grpc.keepalive_time_ms": 6_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.ping_timeout_ms": 3_000,
    "grpc.max_reconnect_backoff_ms": 250,
}
_AGAIN_SECONDS = 0.05


class Link:
    """One replica. Made within a running event loop.

    Args:
        index: the replica's number.
        address: ``host:port`` of its front.
        queue_size: prompts that it takes at once.
        socket: where the front takes calls from this machine; None: it is on another one.
    """

    def __init__(self, index: int, address: str, queue_size: int, socket: Path | None = None) -> None:
        self.index, self.address, self.queue_size = index, address, queue_size
        self._channel = grpc.aio.insecure_channel(address, options=list(_OPTIONS.items()))
        self.unary = self._channel.unary_unary(f"/{SERVICE_NAME}/GeneratorReply")
        method = self._channel.stream_stream(f"/{SERVICE_NAME}/Multiplex")
        self.multiplex = nearest(socket, method, _SILENCE_SECONDS)
        self.bundle = Bundle(self.multiplex)
        """For streams."""
        self._health = self._channel.unary_unary(
            f"/{SERVICE_NAME}/Health", Empty.SerializeToString, HealthReply.FromString
        )
        self._stats = self._channel.unary_unary(
            f"/{SERVICE_NAME}/Stats", Empty.SerializeToString, StatsReply.FromString
        )
        self._watch = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        self.ready = False
        self.reason = "it has not answered yet"
        """Why it is not ready."""
        self.life = 0
        """Grows each time that it becomes ready."""
        self.tokens = 0
        """Outstanding work, as `mii.grpc_related.routing` counts it."""
        self.prompts = 0
        """Outstanding prompts."""

    def room(self, planned: int = 0) -> bool:
        """Whether it takes one more prompt on top of `planned` ones. A call of any size finds room in an idle one."""
        return not self.prompts or self.prompts + planned < self.queue_size

    @contextmanager
    def carrying(self, prompts: int, tokens: int) -> Iterator[None]:
        """Counts what it has while the block runs."""
        self.prompts += prompts
        self.tokens += tokens
        try:
            yield
        finally:
            self.prompts -= prompts
            self.tokens -= tokens

    async def watch(self, changed: Callable[[Link], object]) -> None:
        """Keeps `ready` up to date and calls `changed` after each change; runs until it is cancelled."""
        while True:
            call = self._watch(HealthCheckRequest(service=SERVICE_NAME), wait_for_ready=True)
            reason = "it is shutting down"
            try:
                while (state := await call.read()) is not grpc.aio.EOF:
                    serving = state.status == HealthCheckResponse.SERVING
                    self._set("" if serving else "it has no engine now", changed)
            except grpc.aio.AioRpcError as error:
                reason = f"its connection is lost: {error.details()}"
            finally:
                call.cancel()
            self._set(reason, changed)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def health(self, timeout: float) -> HealthReply:
        """What the replica says; where it says nothing, why.

        Args:
            timeout: seconds.
        """
        try:
            return await self._health(Empty(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return HealthReply(reason=error.details() or str(error.code()))

    async def stats(self, timeout: float) -> bytes:
        """What the replica counts, as JSON; an empty object where it does not say.

        Args:
            timeout: seconds.
        """
        try:
            reply = await self._stats(Empty(), timeout=timeout)
        except grpc.aio.AioRpcError:
            return b"{}"
        return bytes(reply.json)

    def retire(self) -> None:
        """Says that it gets no more calls. What it carries goes on."""
        self.ready, self.reason = False, "it is being taken away"

    async def close(self) -> None:
        """Ends every call that still runs."""
        await self.bundle.close()
        await self._channel.close()

    def _set(self, reason: str, changed: Callable[[Link], Any]) -> None:
        """Takes in why the replica is not ready; an empty reason: it is."""
        was, self.ready, self.reason = self.ready, not reason, reason
        if self.ready == was:
            return
        if self.ready:
            self.life += 1
            logger.info("replica %d at %s can answer", self.index, self.address)
        else:
            logger.warning("replica %d at %s is left out: %s", self.index, self.address, reason)
        changed(self)
