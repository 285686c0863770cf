"""Calls to a replica with nothing but gRPC's own stubs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio

from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub

__all__ = ["Streamed", "ask", "connected", "in_loop", "status", "stream"]

T = TypeVar("T")
Prompt = str | Sequence[int]


def in_loop(work: Coroutine[Any, Any, T], seconds: float = 60.0) -> T:
    """Runs `work` to its end in an event loop of its own."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(bounded())


@asynccontextmanager
async def connected(address: str, *options: tuple[str, int]) -> AsyncIterator[ModelResponseStub]:
    """A stub over a connection of its own."""
    own = ("grpc.use_local_subchannel_pool", 1)
    async with grpc.aio.insecure_channel(address, [*CHANNEL_OPTIONS, own, *options]) as channel:
        yield ModelResponseStub(channel)


@dataclass
class Streamed:
    """What a stream said of its prompts, by their places."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    lengths: dict[int, list[int]] = field(default_factory=dict)
    messages: int = 0

    def take(self, reply: MultiGenerationReply) -> None:
        self.messages += 1
        for piece in reply.response:
            assert piece.index not in self.reasons, "a piece came after the last one"
            self.texts[piece.index] = self.texts.get(piece.index, "") + piece.response
            self.lengths.setdefault(piece.index, []).append(piece.generated_tokens)
            if piece.finish_reason != "none":
                assert piece.response == ""
                self.reasons[piece.index] = piece.finish_reason
            if piece.error:
                self.errors[piece.index] = piece.error


async def ask(stub: ModelResponseStub, prompts: Sequence[Prompt], timeout: float = 60.0, **options: Any) -> list[Any]:
    """The answers of a unary call."""
    reply = await stub.GeneratorReply(pack_request(prompts, options), timeout=timeout)
    return list(reply.response)


async def stream(stub: ModelResponseStub, prompts: Sequence[Prompt], timeout: float = 60.0, **options: Any) -> Streamed:
    """A stream, read to its end."""
    streamed = Streamed()
    async for reply in stub.GeneratorReplyStream(pack_request(prompts, options), timeout=timeout):
        streamed.take(reply)
    return streamed


async def status(call: Any) -> grpc.aio.AioRpcError | None:
    """The error that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None
