"""The gRPC service of a deployment: it passes calls on to replicas, and answers as they come.

Replies to calls that wait for all of it pass through as bytes, but for those that were split over replicas, which are
put in order. Streams of all callers share one stream to each replica, because a gRPC message costs more than what is in
it: what comes for a caller waits here until the caller has room and it is its turn, merged where it is more than one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from mii.errors import AccessError, RequestCancelledError, ServerUnavailableError
from mii.grpc_related.answers import Answers, Piece, parted, runs
from mii.grpc_related.dispatch import Dispatcher, Shard
from mii.grpc_related.links import Link
from mii.grpc_related.local_stream import LocalStream
from mii.grpc_related.options import REQUEST_ID, SERVICE_NAME, TOKEN
from mii.grpc_related.pacer import MESSAGES_A_SECOND, MESSAGES_AT_ONCE, Pacer
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage, HealthReply, MultiGenerationReply, StatsReply
from mii.grpc_related.statuses import NO_RETRY, Status, status_of
from mii.grpc_related.switchboard import Switchboard
from mii.logging import logger

__all__ = ["LoadBalancer"]

_ASK_SECONDS = 5.0
_OURS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_ERROR = "error"  # the finish reason of an answer that is not complete
_NOT_PASSED_ON = ("grpc-", ":", "user-agent", TOKEN)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_T = TypeVar("_T")


class _Call:
    """A caller's RPC."""

    def __init__(self, context: Context) -> None:
        self.context = context
        given = context.invocation_metadata() or ()
        self.metadata = tuple((key, value) for key, value in given if not key.startswith(_NOT_PASSED_ON))
        self.request_id = str(dict(self.metadata).get(REQUEST_ID, ""))
        self.name = self.request_id or "without an id"
        self.code = grpc.StatusCode.OK
        self.writing_since = 0.0
        """When the message that is being written was begun; 0.0: none is."""
        self.stopped: Exception | None = None
        """What the caller is told where this process has ended the call."""
        self.answers: Answers | None = None
        self.work: asyncio.Future[Any] | None = None
        """What runs for the call; None: the task that called `LoadBalancer`."""

    def stop(self, error: Exception) -> None:
        """Ends what runs for the call now; the caller gets `error`.

        The task that writes to the caller is not cancelled: gRPC goes on with a message that was begun, and a status
        may not come in between. It ends once there is room for the message, or the caller is gone.
        """
        self.stopped = error
        if self.answers is not None:
            self.answers.fail(error)
        assert self.work is not None
        self.work.cancel()

    async def write(self, answers: Answers) -> None:
        """Passes on what comes until all has; each message waits until the caller has room for it."""
        while pieces := await answers.take():
            for message in _messages(pieces):
                self.writing_since = time.monotonic()
                await self.context.write(message)
                self.writing_since = 0.0

    async def unary(self, shard: Shard, link: Link) -> bytes:
        """The reply of a replica."""
        rpc = link.unary(shard.request, timeout=self.context.time_remaining(), metadata=self.metadata)
        try:
            return bytes(await rpc)
        finally:
            rpc.cancel()

    async def abort(self, error: Exception) -> None:
        """Ends with the status of an error. Never while a message is being written."""
        status = _status(error)
        self.code = status[0]
        await self.context.abort(*status)


class LoadBalancer:
    """Serves calls over replicas. Made within a running event loop.

    Args:
        links: the replicas; they may come and go, see `on_change` and `on_removal`.
        token: what `Terminate` asks for.
        terminate: ends the deployment; returns at once.
    """

    def __init__(self, links: Sequence[Link], *, token: str, terminate: Callable[[str], None]) -> None:
        self._links, self._token, self._terminate = links, token, terminate
        self._dispatcher = Dispatcher(links)
        self._calls: Counter[str] = Counter()
        self._running: set[_Call] = set()
        self._switchboards: set[Switchboard] = set()
        self._pacer = Pacer(MESSAGES_A_SECOND, MESSAGES_AT_ONCE)
        self._started = time.monotonic()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server."""
        empty, methods = Empty.FromString, grpc.method_handlers_generic_handler
        return methods(
            SERVICE_NAME,
            {
                "GeneratorReply": grpc.unary_unary_rpc_method_handler(self._reply),
                "GeneratorReplyStream": grpc.unary_stream_rpc_method_handler(self._reply_stream),
                "Multiplex": grpc.stream_stream_rpc_method_handler(self._multiplex, CallerMessage.FromString),
                "Health": grpc.unary_unary_rpc_method_handler(self._health, empty, HealthReply.SerializeToString),
                "Stats": grpc.unary_unary_rpc_method_handler(self._stats, empty, StatsReply.SerializeToString),
                "Terminate": grpc.unary_unary_rpc_method_handler(self._end, empty, Empty.SerializeToString),
            },
        )

    def on_change(self, link: Link) -> None:
        """A replica has come or gone."""
        self._dispatcher.on_change(link)

    def on_removal(self, link: Link) -> None:
        """A replica is not among the links any more; what it carries goes on."""
        self._dispatcher.on_removal(link)

    def drain(self) -> None:
        """Calls that wait for a replica are refused from now on."""
        self._dispatcher.draining = True
        self._dispatcher.wake()
        for switchboard in self._switchboards:
            switchboard.finish()

    def end(self, reason: str) -> None:
        """Ends what still runs; its callers get `reason`."""
        for switchboard in self._switchboards:
            switchboard.fail_all(ServerUnavailableError(reason))
        for call in self._running:
            call.stop(ServerUnavailableError(reason))

    def end_stalled(self, seconds: float) -> None:
        """Ends the calls whose caller has taken nothing for so long."""
        latest = time.monotonic() - seconds
        for call in self._running:
            if 0.0 < call.writing_since < latest and call.stopped is None:
                logger.info("call %s is ended: its reader took nothing for %g s", call.name, seconds)
                call.stop(RequestCancelledError(f"the reader of this stream took nothing for {seconds:g} s"))

    # Methods

    async def _reply(self, request: bytes, context: Context) -> bytes:
        """All answers at once."""
        async with self._call(context) as call:
            shards = await self._dispatcher.split(request)
            if len(shards) == 1:
                (shard,) = shards
                return await self._dispatcher.carry(shard, lambda link: call.unary(shard, link), call.name)
            return _merged(shards, await _together([self._part(shard, call) for shard in shards]))

    async def _reply_stream(self, request: bytes, context: Context) -> None:
        """Answers as they come."""
        async with self._call(context) as call:
            shards = await self._dispatcher.split(request)
            answers = call.answers = Answers(len(shards), self._pacer)
            works = [self._part_stream(shard, call, answers, alone=len(shards) == 1) for shard in shards]
            parts = call.work = asyncio.ensure_future(_together(works))
            try:
                await call.write(answers)
                failures = await parts
            finally:
                parts.cancel()
                await asyncio.gather(parts, return_exceptions=True)
            if all(failures):
                raise next(filter(None, failures))

    async def serve_local(self, stream: LocalStream) -> None:
        """Many calls in one stream of a process of this machine."""
        await self._multiplex(stream.messages(), stream)

    async def _multiplex(self, messages: AsyncIterator[CallerMessage], context: Context | LocalStream) -> None:
        """Many calls in one stream."""
        switchboard = Switchboard(self._dispatcher, context.write, status=_status, ended=self._count)
        self._switchboards.add(switchboard)
        try:
            if self._dispatcher.draining:
                switchboard.finish()
            await switchboard.serve(messages)
        finally:
            self._switchboards.discard(switchboard)

    def _count(self, code: grpc.StatusCode) -> None:
        self._calls[code.name] += 1

    async def _health(self, request: Any, context: Context) -> HealthReply:
        """Asks every replica; ready means that one at least is."""
        links = list(self._links)  # they may change meanwhile
        answers = await asyncio.gather(*(link.health(_ASK_SECONDS) for link in links))
        reply, reasons = HealthReply(), []
        for link, answer in zip(links, answers, strict=True):
            entry = reply.replicas.add(ready=answer.ready, reason=answer.reason)
            if answer.replicas:
                entry.MergeFrom(answer.replicas[0])
            entry.address = link.address
            reasons.append(f"replica {link.index}: {answer.reason}")
        reply.ready = any(answer.ready for answer in answers) and not self._dispatcher.draining
        reply.reason = "" if reply.ready else "; ".join(reasons)
        return reply

    async def _stats(self, request: Any, context: Context) -> StatsReply:
        """What this process counts, and each replica."""
        links = list(self._links)  # they may change meanwhile
        answers = await asyncio.gather(*(link.stats(_ASK_SECONDS) for link in links))
        replicas = [
            {
                **json.loads(answer),
                "replica": link.index,
                "address": link.address,
                "ready": link.ready,
                "lives": link.life,
                "sent_prompts": link.prompts,
                "sent_tokens": link.tokens,
            }
            for link, answer in zip(links, answers, strict=True)
        ]
        return StatsReply(json=json.dumps({"balancer": self._numbers(), "replicas": replicas}).encode())

    async def _end(self, request: Any, context: Context) -> Empty:
        """Ends the whole deployment, for whoever has its token."""
        async with self._call(context):
            given = dict(context.invocation_metadata() or ()).get(TOKEN, "")
            if not hmac.compare_digest(str(given).encode(), self._token.encode()):
                raise AccessError(f"only who has the deployment's token may end it; give it as metadata {TOKEN!r}")
            self._terminate(f"asked by {context.peer()}")
        return Empty()

    # Within

    async def _part(self, shard: Shard, call: _Call) -> bytes | Exception:
        """The reply to a part of a call, or why there is none; what the caller did wrong is raised."""
        try:
            return await self._dispatcher.carry(shard, lambda link: call.unary(shard, link), call.name)
        except (ServerUnavailableError, grpc.aio.AioRpcError) as error:
            if not _is_ours(error):
                raise
            return error

    async def _part_stream(self, shard: Shard, call: _Call, answers: Answers, *, alone: bool) -> Exception | None:
        """Puts the answers of a part of a call where its writer takes them. Returns why it failed, if the others of the
        call go on; the caller is told so for each answer that is missing.
        """
        running = set(shard.places)

        def take(pieces: Sequence[Piece]) -> None:
            shard.sent = True
            answers.push(pieces)
            if not alone:
                running.difference_update(piece.index for piece in pieces if not runs(piece))

        try:
            run = partial(self._run_stream, shard, call, take)
            await self._dispatcher.carry(shard, run, call.name)
        except Exception as error:
            if alone or not _is_ours(error):
                answers.fail(error)
            else:
                answers.push(_failed(running, error).response)
                return error
        finally:
            answers.end_part()
        return None

    async def _run_stream(
        self, shard: Shard, call: _Call, take: Callable[[Sequence[Piece]], object], link: Link
    ) -> None:
        await link.bundle.run(shard.request, call.request_id, take)

    @asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[_Call]:
        """A call from its beginning to its end, whatever ends it; errors become statuses."""
        call = _Call(context)
        call.work = asyncio.current_task()
        self._running.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            call.code = grpc.StatusCode.CANCELLED
            if call.stopped is None or context.cancelled():
                raise
            await call.abort(call.stopped)
        except grpc.aio.InternalError:  # a message cannot be sent: the caller is gone
            call.code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except Exception as error:
            await call.abort(error)
        finally:
            self._running.discard(call)
            self._calls[call.code.name] += 1

    def _numbers(self) -> dict[str, Any]:
        return {
            "calls": dict(self._calls),
            "running_calls": len(self._running),
            "outstanding": self._dispatcher.prompts,
            "held_calls": self._dispatcher.held,
            "retries": self._dispatcher.retries,
            "replicas_ready": sum(link.ready for link in self._links),
            "replicas": len(self._links),
            "uptime_seconds": time.monotonic() - self._started,
        }


def _status(error: Exception) -> Status:
    """How a call ends for its caller: as at the replica, but that nothing is left to be tried again."""
    if isinstance(error, grpc.aio.AioRpcError):
        given = [(key, value) for key, value in error.trailing_metadata() or () if not key.startswith("grpc-")]
        code, details, metadata = error.code(), error.details() or "", tuple(given)
    else:
        code, details, metadata = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.error("a call failed: %s", details, exc_info=error)
    return code, details, (*metadata, NO_RETRY) if code is grpc.StatusCode.UNAVAILABLE else metadata


def _is_ours(error: Exception) -> bool:
    """Whether an error is not the caller's, who then gets the other answers; one that is ends the whole call."""
    return isinstance(error, ServerUnavailableError) or (
        isinstance(error, grpc.aio.AioRpcError) and error.code() in _OURS
    )


def _messages(pieces: Sequence[Piece]) -> Iterator[bytes]:
    """What came as messages for the caller, in which an answer has one piece at most: first text, then ends."""
    if len(pieces) == 1:
        yield MultiGenerationReply(response=pieces).SerializeToString()
        return
    for part in parted(pieces):
        if part:
            yield MultiGenerationReply(response=part).SerializeToString()


def _failed(places: Collection[int], error: Exception) -> MultiGenerationReply:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    reply = MultiGenerationReply()
    for place in sorted(places):
        reply.response.add(index=place, finish_reason=_ERROR, error=details or "the replica failed")
    return reply


def _merged(shards: Sequence[Shard], results: Sequence[bytes | Exception]) -> bytes:
    """The answers of all parts in the order of the prompts.

    Raises:
        Exception: there are none.
    """
    reply, failures = MultiGenerationReply(), []
    for shard, result in zip(shards, results, strict=True):
        if isinstance(result, Exception):
            failures.append(result)
            reply.MergeFrom(_failed(shard.places, result))
        else:
            reply.MergeFromString(result)
    if len(failures) == len(shards):
        raise failures[0]
    reply.response.sort(key=lambda answer: answer.index)
    return reply.SerializeToString()


async def _together(works: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Runs all; when one raises or this is cancelled, the others are ended too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
