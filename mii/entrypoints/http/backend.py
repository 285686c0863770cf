"""The way from an HTTP server to a deployment: calls of its load balancer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.empty_pb2 import Empty

from mii.backend.calls import Attempts, unary_async
from mii.entrypoints.http.errors import ApiError, api_error, no_permission
from mii.errors import MIIError, RequestTimeoutError
from mii.grpc_related.answers import Answers, Piece
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS, REQUEST_ID, SERVICE_NAME, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.statuses import error_of
from mii.grpc_related.trunk import Bundle

__all__ = ["Backend", "Call", "Piece", "error_of_answer"]

_OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
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
        self._streams: Any = None

    def open(self) -> None:
        """Makes the connection; it is dialled when it is needed, and again whenever it is lost."""
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = ModelResponseStub(self._channel)
        self._streams = Bundle(self._channel.stream_stream(f"/{SERVICE_NAME}/Multiplex"))

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

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece], None]:
        """What comes of the answers, as it comes. Closing the iterator ends the call, wherever it is.

        Raises:
            ApiError: the call has failed.
        """
        try:
            requests = [_alone(call, place) for place in range(len(call.prompts))]
            attempts = self._attempts()
            while True:
                answers = Answers(len(requests))
                try:
                    async with self._running(requests, answers, attempts.remaining(), call.request_id):
                        while pieces := await answers.take():
                            yield pieces
                    return
                except grpc.aio.AioRpcError as error:
                    seconds = attempts.pause(error, answers.started)
                await asyncio.sleep(seconds)
        except MIIError as error:
            raise api_error(error) from error

    @asynccontextmanager
    async def _running(
        self, requests: Sequence[bytes], answers: Answers, timeout: float | None, name: str
    ) -> AsyncIterator[None]:
        """Runs a call for each request while the block runs."""
        alone = len(requests) == 1
        runs = (self._run(request, name, place, answers, alone) for place, request in enumerate(requests))
        tasks = [asyncio.ensure_future(run) for run in runs]
        late = RequestTimeoutError(f"the answer was not complete within timeout={self._timeout} s")
        timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, answers.fail, late)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            for task in tasks:
                task.cancel()

    async def _run(self, request: bytes, name: str, place: int, answers: Answers, alone: bool) -> None:
        try:
            await self._streams.run(request, name, answers.push)
        except grpc.aio.AioRpcError as error:
            # One of several may fail alone, where that is our fault and some of the call has come.
            if alone or error.code() not in _OURS or not answers.started:
                answers.fail(error)
            else:
                answers.push([Piece(index=place, finish_reason="error", error=error.details() or "no reason given")])
        finally:
            answers.end_part()

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
