"""The way from an HTTP server to a deployment: calls of its load balancer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
import msgspec
from google.protobuf.empty_pb2 import Empty

from mii.backend.calls import Attempts, stream_async, unary_async
from mii.entrypoints.http.errors import ApiError, api_error, no_permission
from mii.errors import MIIError
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS, REQUEST_ID, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply, SingleGenerationReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.statuses import error_of

__all__ = ["Backend", "Call", "Piece", "error_of_answer"]

Piece: TypeAlias = SingleGenerationReply
"""An answer, or a part of one: text in `response`, and the `index` of its prompt."""

_WRONG_TOKEN = "the token is not this deployment's; it is in the file 'token' of the deployment's folder"
_CONTROL_SECONDS = 8.0  # for calls that generate nothing


@dataclass(frozen=True)
class Call:
    """What is asked of a deployment.

    Args:
        prompts: texts or lists of token ids.
        options: generation options by name, see `mii.config.GenerateParamsConfig`.
        request_id: names the call in every log.
    """

    prompts: Sequence[str | Sequence[int]]
    options: Mapping[str, Any]
    request_id: str = ""


class Backend:
    """A deployment, seen through its load balancer. Used by one event loop, between `open` and `close`.

    Args:
        address: ``host:port`` of the load balancer.
        timeout: seconds that a call may take; None: any.
    """

    def __init__(self, address: str, timeout: float | None = None) -> None:
        self.address, self._timeout = address, timeout
        self._channel: Any = None
        self._stub: Any = None

    def open(self) -> None:
        """Makes the connection; it is dialled when it is needed, and again whenever it is lost."""
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = ModelResponseStub(self._channel)

    async def close(self) -> None:
        """Ends every call that still runs."""
        if self._channel is not None:
            await self._channel.close()

    async def generate(self, call: Call) -> list[Piece]:
        """All answers, in the order of the prompts. An answer that failed has an `error`.

        Raises:
            ApiError: the call has failed.
        """
        try:
            message = pack_request(call.prompts, call.options)
            reply = await unary_async(self._stub.GeneratorReply, message, self._attempts(), _metadata(call))
        except MIIError as error:
            raise api_error(error) from error
        return sorted(reply.response, key=lambda answer: answer.index)

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece], None]:
        """What comes of the answers, as it comes. Closing the iterator ends the call, wherever it is.

        Raises:
            ApiError: the call has failed.
        """
        try:
            message = pack_request(call.prompts, call.options)
            replies = stream_async(self._stub.GeneratorReplyStream, message, self._attempts(), _metadata(call))
            async with aclosing(replies):
                async for reply in replies:
                    yield reply.response
        except MIIError as error:
            raise api_error(error) from error

    async def health(self) -> HealthReply:
        """What the engines say.

        Raises:
            ApiError: nobody says anything.
        """
        return await self._control("Health")

    async def stats(self) -> dict[str, Any]:
        """Counters of the load balancer and of the replicas.

        Raises:
            ApiError: nobody says anything.
        """
        reply = await self._control("Stats")
        decoded = msgspec.json.decode(reply.json or b"{}")
        return decoded if isinstance(decoded, dict) else {}

    async def terminate(self, token: str) -> None:
        """Ends the deployment.

        Args:
            token: the deployment's.

        Raises:
            ApiError: the token is wrong, or nobody is there.
        """
        if not (token.isascii() and token.isprintable()):  # gRPC sends no other
            raise no_permission(_WRONG_TOKEN)
        try:
            await self._control("Terminate", ((TOKEN, token),))
        except ApiError as error:
            if error.status == 403:
                raise no_permission(_WRONG_TOKEN) from error
            raise

    async def _control(self, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        try:
            return await getattr(self._stub, method)(Empty(), timeout=_CONTROL_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise api_error(error_of(error)) from error

    def _attempts(self) -> Attempts:
        return Attempts(self._timeout, lambda: None, f"the load balancer at {self.address}")


def error_of_answer(answer: Piece) -> ApiError:
    """An answer that ended before it was complete."""
    return ApiError(500, answer.error, code="generation_failed")


def _metadata(call: Call) -> tuple[tuple[str, str], ...]:
    return ((REQUEST_ID, call.request_id),) if call.request_id else ()
