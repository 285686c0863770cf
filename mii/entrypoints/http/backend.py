"""The way from an HTTP server to a deployment: calls of its load balancer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.empty_pb2 import Empty

from mii.backend.bundled import BundledCall
from mii.backend.calls import Attempts, unary_async
from mii.entrypoints.http.errors import ApiError, api_error, no_permission
from mii.errors import MIIError
from mii.grpc_related.answers import Piece
from mii.grpc_related.convert import pack_request
from mii.grpc_related.local_stream import nearest
from mii.grpc_related.options import CHANNEL_OPTIONS, REQUEST_ID, SERVICE_NAME, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.statuses import error_of
from mii.grpc_related.trunk import Bundle

__all__ = ["Backend", "Call", "Piece", "error_of_answer"]

_WRONG_TOKEN = "the token is not this deployment's; it is in the file 'token' of the deployment's folder"
_SILENCE_SECONDS = 30.0  # of the load balancer
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
        socket: where it takes calls of processes of its machine; None: it is only spoken to in gRPC.
        timeout: seconds that a call may take; None: any.
    """

    def __init__(self, address: str, timeout: float | None = None, socket: Path | None = None) -> None:
        self.address, self._timeout, self._socket = address, timeout, socket
        self._channel: Any = None
        self._stub: Any = None
        self._streams: Any = None

    def open(self) -> None:
        """Makes the connection; it is dialled when it is needed, and again whenever it is lost."""
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = ModelResponseStub(self._channel)
        method = self._channel.stream_stream(f"/{SERVICE_NAME}/Multiplex")
        self._streams = Bundle(nearest(self._socket, method, _SILENCE_SECONDS))

    async def close(self) -> None:
        """Ends every call that still runs."""
        if self._channel is not None:
            await self._streams.close()
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

    def stream(self, call: Call) -> BundledCall:
        """The same as it comes: a stream for each of the prompts.

        Raises:
            ApiError: a prompt or an option cannot be sent.
        """
        try:
            requests = [_alone(call, place) for place in range(len(call.prompts))]
        except MIIError as error:
            raise api_error(error) from error
        return BundledCall(self._streams, requests, self._attempts(), call.request_id)

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


def _alone(call: Call, place: int) -> bytes:
    """A request for one of a call's prompts, which keeps its place in the call."""
    request = pack_request([call.prompts[place]], call.options)
    del request.positions[:]
    request.positions.append(place)
    return request.SerializeToString()


def error_of_answer(answer: Piece) -> ApiError:
    """An answer that ended before it was complete."""
    return ApiError(500, answer.error, code="generation_failed")


def _metadata(call: Call) -> tuple[tuple[str, str], ...]:
    return ((REQUEST_ID, call.request_id),) if call.request_id else ()
