"""Requests over gRPC, to a load balancer or to a replica itself.

Below the stubs and the client of mii, so that a message costs as little as gRPC allows; nothing is tried again.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio

from mii.benchmark.serving.target import TargetSpec
from mii.benchmark.serving.trace import Failed, Trace
from mii.benchmark.serving.work import Ask
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS, SERVICE_NAME
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply
from mii.grpc_related.statuses import KIND

__all__ = ["GrpcTarget"]


class GrpcTarget:
    """See `mii.benchmark.serving.target.Target`."""

    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._channel = grpc.aio.insecure_channel(spec.address, options=CHANNEL_OPTIONS)
        read = MultiGenerationReply.FromString
        self._stream = self._channel.unary_stream(f"/{SERVICE_NAME}/GeneratorReplyStream", None, read)
        self._unary = self._channel.unary_unary(f"/{SERVICE_NAME}/GeneratorReply", None, read)

    def pack(self, ask: Ask) -> bytes:
        options = {"max_new_tokens": ask.new_tokens, **self._spec.options}
        payload: bytes = pack_request([ask.prompt], options).SerializeToString()
        return payload

    async def send(self, payload: bytes, trace: Trace) -> None:
        try:
            if self._spec.stream:
                await self._read(self._stream(payload, timeout=self._spec.timeout), trace)
            else:
                _note(await self._unary(payload, timeout=self._spec.timeout), trace)
        except grpc.aio.AioRpcError as error:
            named = dict(error.trailing_metadata() or ()).get(KIND)
            raise Failed(str(named or error.code().name), error.details() or "") from None

    async def close(self) -> None:
        await self._channel.close()

    async def _read(self, call: Any, trace: Trace) -> None:
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                _note(reply, trace)
        finally:
            call.cancel()


def _note(reply: MultiGenerationReply, trace: Trace) -> None:
    now = time.monotonic()
    for piece in reply.response:
        if piece.error:
            raise Failed("GenerationError", piece.error)
        new = piece.generated_tokens - trace.tokens
        if new > 0:
            trace.prompt_tokens = piece.prompt_tokens
            trace.add(now, new)
