"""The gRPC service of one replica."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from mii.errors import AccessError, GenerationError, RequestCancelledError, ServerUnavailableError
from mii.grpc_related.convert import pack_logprobs, positions_of, prompts_of, unpack_options
from mii.grpc_related.generation import Generation, Piece
from mii.grpc_related.local_stream import LocalStream
from mii.grpc_related.multiplex import Calls, Multiplexer
from mii.grpc_related.options import REQUEST_ID, SERVICE_NAME, STALL_SECONDS, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import (
    CallerMessage,
    CallReply,
    HealthReply,
    MultiGenerationReply,
    MultiStringRequest,
    ReplicaHealth,
    StatsReply,
)
from mii.grpc_related.statuses import status_of
from mii.grpc_related.text_session import TextSession
from mii.grpc_related.wire import reply_bytes, running_bytes
from mii.logging import logger

__all__ = ["STALL_SECONDS", "ReplicaService"]

_HEALTH_SECONDS, _STATS_SECONDS = 5.0, 0.5
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
GiveUp: TypeAlias = Callable[[Exception], object]


class ReplicaService:
    """Answers calls over a `TextSession`.

    Args:
        session: the engine, tokenizer and queue.
        token: what `Terminate` asks for.
        terminate: ends the deployment; returns at once.
        stall_seconds: see `STALL_SECONDS`.
    """

    def __init__(
        self,
        session: TextSession,
        token: str,
        terminate: Callable[[str], None],
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._session, self._token, self._terminate = session, token, terminate
        self._stall_seconds = stall_seconds
        self._sending: dict[Context | LocalStream, tuple[float, GiveUp]] = {}  # since when
        self._multiplexers: set[Multiplexer] = set()
        self.draining = False
        """Whether new calls are refused."""

    async def GeneratorReply(self, request: MultiStringRequest, context: Context) -> MultiGenerationReply:
        """All answers when the last one has ended. A call whose every answer failed has an error status."""
        started, reply = time.monotonic(), MultiGenerationReply()
        async with self._call(request, context, streams=False) as generation:
            pieces = await generation.all()
            _check_any_complete(pieces)
            _write(reply, pieces, time.monotonic() - started)
        return reply

    async def GeneratorReplyStream(self, request: MultiStringRequest, context: Context) -> None:
        """Pieces as they come. A stream of one prompt that fails has an error status; of several, the others go on."""
        started = time.monotonic()
        async with self._call(request, context, streams=True) as generation:
            give_up = partial(self._session.fail_call, generation)
            while True:
                pieces, last = await generation.take()
                if not pieces and not last:
                    break
                if len(generation) == 1:
                    _check_any_complete(last)
                for part in (pieces, last):
                    if part:
                        reply = MultiGenerationReply()
                        _write(reply, part, time.monotonic() - started)
                        await self._send(context, give_up, reply)

    async def Multiplex(self, messages: AsyncIterator[CallerMessage], context: Context) -> None:
        """The same for many calls in one stream."""
        try:
            await self._multiplex(messages, context)
        except RequestCancelledError as error:
            await self._abort(error, context)

    async def serve_local(self, stream: LocalStream) -> None:
        """`Multiplex` for a process of this machine."""
        with contextlib.suppress(RequestCancelledError):  # its reader takes nothing; the calls were told
            await self._multiplex(stream.messages(), stream)

    async def _multiplex(self, messages: AsyncIterator[CallerMessage], context: Context | LocalStream) -> None:
        calls = Calls(partial(self._open, streams=False), self._session.close_call, _new_bytes, self._count)
        multiplexer = Multiplexer(calls, lambda message: self._send(context, multiplexer.fail, message))
        self._multiplexers.add(multiplexer)
        try:
            if self.draining:
                multiplexer.finish()
            await multiplexer.serve(messages)
        finally:
            self._multiplexers.discard(multiplexer)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server. What `Multiplex` says is bytes already."""
        asked, replied, empty = MultiStringRequest.FromString, MultiGenerationReply.SerializeToString, Empty.FromString
        methods = {
            "GeneratorReply": grpc.unary_unary_rpc_method_handler(self.GeneratorReply, asked, replied),
            "GeneratorReplyStream": grpc.unary_stream_rpc_method_handler(self.GeneratorReplyStream, asked, replied),
            "Multiplex": grpc.stream_stream_rpc_method_handler(self.Multiplex, CallerMessage.FromString),
            "Health": grpc.unary_unary_rpc_method_handler(self.Health, empty, HealthReply.SerializeToString),
            "Stats": grpc.unary_unary_rpc_method_handler(self.Stats, empty, StatsReply.SerializeToString),
            "Terminate": grpc.unary_unary_rpc_method_handler(self.Terminate, empty, Empty.SerializeToString),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    def drain(self) -> None:
        """Refuses new calls from now on."""
        self.draining = True
        for multiplexer in self._multiplexers:
            multiplexer.finish()

    async def Health(self, request: Any, context: Context) -> HealthReply:
        """Asks the engine itself, so a hung one is not called ready."""
        engine = self._session.engine
        reason = "the server is shutting down" if self.draining else await engine.check(_HEALTH_SECONDS)
        replica = ReplicaHealth(ready=not reason, reason=reason, outstanding=self._session.outstanding)
        if engine.info is not None:
            replica.max_length, replica.vocab_size = engine.info.max_length, engine.info.vocab_size
            replica.device, replica.dtype = engine.info.device, engine.info.dtype
        return HealthReply(ready=replica.ready, reason=reason, replicas=[replica])

    async def Stats(self, request: Any, context: Context) -> StatsReply:
        """What the replica counts, see `TextSession.numbers`; the engine's part as fresh as it says it in a moment."""
        await self._session.engine.check(_STATS_SECONDS)
        return StatsReply(json=json.dumps(self._session.numbers()).encode())

    async def Terminate(self, request: Any, context: Context) -> Any:
        """Ends the whole deployment, for whoever has its token."""
        given = _metadata(context, TOKEN)
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            error = AccessError(f"only who has the deployment's token may end it; give it as metadata {TOKEN!r}")
            await context.abort(*status_of(error))
        self._terminate(f"asked by {context.peer()}")
        return type(request)()

    async def watch(self) -> None:
        """Ends streams that nobody reads, until it is cancelled. What they hold is free at once; the message that waits
        for its reader goes on to wait, since gRPC lets no status come in between.
        """
        error = RequestCancelledError(f"the reader of this stream took nothing for {self._stall_seconds:g} s")
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            latest = time.monotonic() - self._stall_seconds
            for since, give_up in list(self._sending.values()):
                if since < latest:
                    give_up(error)

    async def _send(self, context: Context | LocalStream, give_up: GiveUp, reply: Any) -> None:
        """Returns when there is room for the next message."""
        self._sending[context] = time.monotonic(), give_up
        try:
            await context.write(reply)
        finally:
            del self._sending[context]

    @asynccontextmanager
    async def _call(self, request: MultiStringRequest, context: Context, *, streams: bool) -> AsyncIterator[Generation]:
        """A call from its prompts to its end, whatever ends it; errors become statuses."""
        try:
            generation = await self._open(request, streams=streams)
            try:
                yield generation
            finally:
                self._session.close_call(generation)
            self._session.metrics.calls["OK"] += 1
        except (
            asyncio.CancelledError,
            grpc.aio.InternalError,
        ):  # the latter: a message cannot be sent, the caller is gone
            self._session.metrics.calls["CANCELLED"] += 1
            raise asyncio.CancelledError from None
        except Exception as error:
            await self._abort(error, context)

    async def _open(
        self, request: MultiStringRequest, tell: Callable[[], object] | None = None, *, streams: bool
    ) -> Generation:
        if self.draining:
            raise ServerUnavailableError("the server is shutting down")
        options = unpack_options(request)
        options.pop("stream", None)  # the method says it
        places = positions_of(request)
        return await self._session.open(prompts_of(request), options, places=places, streams=streams, tell=tell)

    async def _abort(self, error: Exception, context: Context) -> None:
        """Ends a call with the status of an error."""
        status = status_of(error)
        self._count(status[0], _metadata(context, REQUEST_ID), error)
        try:
            await context.abort(*status)
        except grpc.aio.InternalError:  # whoever called is gone
            raise asyncio.CancelledError from None

    def _count(self, code: grpc.StatusCode, name: str, error: Exception | None = None) -> None:
        """A call has ended. Our own mistakes are logged with their trace, those of callers for who looks closely."""
        self._session.metrics.calls[code.name] += 1
        if code is grpc.StatusCode.INTERNAL:
            logger.error("request %s failed: %s", name or "without an id", error, exc_info=error)
        elif error is not None:
            logger.debug("request %s: %s: %s", name or "without an id", code.name, error)


def _check_any_complete(pieces: Iterable[Piece]) -> None:
    """Raises `GenerationError` if every answer ended with an error."""
    wrong = [piece.error for piece in pieces]
    if wrong and all(wrong):
        raise GenerationError(str(wrong[0]))


def _new_bytes(call: int, generation: Generation, seconds: float) -> bytes:
    """What is new of a call, as a part of a ServerMessage; may be nothing.

    Raises:
        Exception: how the call ends.
    """
    piece = generation.collect_running()
    if piece is not None:
        generated, model_seconds = piece.generated_length, piece.model_seconds
        return running_bytes(call, piece.text, generated, seconds, model_seconds, piece.index, piece.prompt_length)
    pieces, last = generation.collect()
    if len(generation) == 1:
        _check_any_complete(last)
    reply = CallReply(call=call)
    _write(reply, pieces, seconds)
    _write(reply, last, seconds)
    return reply_bytes(reply) if reply.response else b""


def _write(reply: Any, pieces: Iterable[Piece], seconds: float) -> None:
    for piece in pieces:
        entry = reply.response.add(
            response=piece.text,
            finish_reason=piece.finish_reason.value,
            prompt_tokens=piece.prompt_length,
            generated_tokens=piece.generated_length,
            time_taken=seconds,
            model_time_taken=piece.model_seconds,
            index=piece.index,
            error=piece.error or "",
        )
        if piece.logprobs:
            entry.logprobs.extend(pack_logprobs(piece.logprobs))
        if piece.prompt_logprobs:
            entry.prompt_logprobs.extend(pack_logprobs(piece.prompt_logprobs))


def _metadata(context: Context, name: str) -> str:
    values = [value for key, value in context.invocation_metadata() or () if key == name]
    return str(values[0]) if values else ""
