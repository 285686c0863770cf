"""Requests over gRPC, to a load balancer or to a replica itself.

Below the stubs and the client of mii, so that a message costs as little as gRPC allows; nothing is tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from mii.backend.bundled import BundledCall
from mii.backend.calls import Attempts
from mii.benchmark.serving.target import TargetSpec
from mii.benchmark.serving.trace import Failed, Trace
from mii.benchmark.serving.work import Ask
from mii.errors import MIIError
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS, SERVICE_NAME
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply, SingleGenerationReply
from mii.grpc_related.statuses import KIND
from mii.grpc_related.trunk import Bundle

__all__ = ["GrpcTarget"]


class GrpcTarget:
    """See `mii.benchmark.serving.target.Target`. With the API "grpc" streams share one RPC, as `MIIClient.astream` has
    it; with "rpc" each is an RPC of its own.
    """

    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._channel = grpc.aio.insecure_channel(spec.address, options=CHANNEL_OPTIONS)
        read, service = MultiGenerationReply.FromString, f"/{SERVICE_NAME}"
        self._bundle = Bundle(self._channel.stream_stream(f"{service}/Multiplex"))
        self._stream = self._channel.unary_stream(f"{service}/GeneratorReplyStream", None, read)
        self._unary = self._channel.unary_unary(f"{service}/GeneratorReply", None, read)

    def pack(self, ask: Ask) -> bytes:
        options = {"max_new_tokens": ask.new_tokens, **self._spec.options}
        payload: bytes = pack_request([ask.prompt], options).SerializeToString()
        return payload

    async def send(self, payload: bytes, trace: Trace) -> None:
        timeout = self._spec.timeout
        try:
            if not self._spec.stream:
                _note((await self._unary(payload, timeout=timeout)).response, trace)
            elif self._spec.api == "rpc":
                await self._read(self._stream(payload, timeout=timeout), trace)
            else:
                await self._share(payload, trace)
        except grpc.aio.AioRpcError as error:
            named = dict(error.trailing_metadata() or ()).get(KIND)
            raise Failed(str(named or error.code().name), error.details() or "") from None

    async def close(self) -> None:
        await self._bundle.close()
        await self._channel.close()

    async def _share(self, payload: bytes, trace: Trace) -> None:
        once = Attempts(self._spec.timeout, lambda: "nothing is tried again", self._spec.address)
        try:
            async with BundledCall(self._bundle, [payload], once) as call:
                _note(await call.take(), trace)
                await _Listener(call, trace).done
        except MIIError as error:
            raise Failed(type(error).__name__, str(error)) from None

    async def _read(self, call: Any, trace: Trace) -> None:
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                _note(reply.response, trace)
        finally:
            call.cancel()


class _Listener:
    """Notes what comes of a call in the moment in which its message is read, with no task to wake in between.

    Args:
        call: of which something has come.
        trace: where it is noted.
    """

    def __init__(self, call: BundledCall, trace: Trace) -> None:
        self._call, self._trace = call, trace
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """When all has come; fails as the call does."""
        call.listen(self._advance)

    def _advance(self) -> None:
        if self.done.done():
            return
        try:
            _note(self._call.take_now(), self._trace)
        except Exception as error:
            self.done.set_exception(error)
            return
        if self._call.over:
            self.done.set_result(None)


def _note(pieces: Iterable[SingleGenerationReply], trace: Trace) -> None:
    now = time.monotonic()
    for piece in pieces:
        if piece.error:
            raise Failed("GenerationError", piece.error)
        new = piece.generated_tokens - trace.tokens
        if new > 0:
            trace.prompt_tokens = piece.prompt_tokens
            trace.add(now, new)
