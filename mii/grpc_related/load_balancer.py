"""The gRPC service of a deployment: it passes calls on to replicas, and answers as they come.

Replies pass through as bytes. Each message is read from a replica when the one before it has been written to the
caller, so a caller who is slow is felt by the replica, which merges what piles up. Only the answers of a call that was
split over replicas are looked into, to put them in order and to say which are missing when a replica is lost.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from mii.errors import AccessError, ServerUnavailableError
from mii.grpc_related.dispatch import Dispatcher, Shard
from mii.grpc_related.links import Link
from mii.grpc_related.options import REQUEST_ID, SERVICE_NAME, TOKEN
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
    """What of a caller's RPC goes on to replicas."""

    def __init__(self, context: Context) -> None:
        self.context = context
        given = context.invocation_metadata() or ()
        self.metadata = tuple((key, value) for key, value in given if not key.startswith(_NOT_PASSED_ON))
        self.name = dict(self.metadata).get(REQUEST_ID) or "without an id"
        self.writing_since = 0.0
        """When the message that is being written was begun; 0.0: none is."""

    async def write(self, message: bytes) -> None:
        """Passes a message on; returns when the caller has room for the next one."""
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

    async def stream(self, shard: Shard, link: Link, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Passes the replies of a replica on as they come."""
        rpc = link.stream(shard.request, timeout=self.context.time_remaining(), metadata=self.metadata)
        try:
            while (message := await rpc.read()) is not grpc.aio.EOF:
                shard.sent = True
                await write(message)
        finally:
            rpc.cancel()


class LoadBalancer:
    """Serves calls over replicas. Made within a running event loop.

    Args:
        links: the replicas.
        token: what `Terminate` asks for.
        terminate: ends the deployment; returns at once.
    """

    def __init__(self, links: Sequence[Link], *, token: str, terminate: Callable[[str], None]) -> None:
        self._links, self._token, self._terminate = links, token, terminate
        self._dispatcher = Dispatcher(links)
        self._calls: Counter[str] = Counter()
        self._running: dict[asyncio.Task[Any], _Call] = {}
        self._switchboards: set[Switchboard] = set()
        self._ended = ""
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

    def drain(self) -> None:
        """Calls that wait for a replica are refused from now on."""
        self._dispatcher.draining = True
        self._dispatcher.wake()
        for switchboard in self._switchboards:
            switchboard.finish()

    def end(self, reason: str) -> None:
        """Ends what still runs; its callers get `reason`."""
        self._ended = reason
        for switchboard in self._switchboards:
            switchboard.fail_all(ServerUnavailableError(reason))
        for task in self._running:
            task.cancel()

    def end_stalled(self, seconds: float) -> None:
        """Ends the calls whose caller has taken nothing for so long."""
        latest = time.monotonic() - seconds
        for task, call in self._running.items():
            if 0.0 < call.writing_since < latest:
                logger.info("call %s is ended: its reader took nothing for %g s", call.name, seconds)
                call.writing_since = 0.0
                task.cancel()

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
            if len(shards) == 1:
                (shard,) = shards
                await self._dispatcher.carry(shard, lambda link: call.stream(shard, link, call.write), call.name)
                return
            lock = asyncio.Lock()
            failures = await _together([self._part_stream(shard, call, lock) for shard in shards])
            if all(failures):
                raise next(filter(None, failures))

    async def _multiplex(self, messages: AsyncIterator[CallerMessage], context: Context) -> None:
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
        answers = await asyncio.gather(*(link.health(_ASK_SECONDS) for link in self._links))
        reply, reasons = HealthReply(), []
        for link, answer in zip(self._links, answers, strict=True):
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
        answers = await asyncio.gather(*(link.stats(_ASK_SECONDS) for link in self._links))
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
            for link, answer in zip(self._links, answers, strict=True)
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
            return _if_ours(error)

    async def _part_stream(self, shard: Shard, call: _Call, lock: asyncio.Lock) -> Exception | None:
        """Passes a part of a call on. Returns why it failed; the caller has been told, for each answer."""
        running = set(shard.places)

        async def write(message: bytes) -> None:
            async with lock:
                await call.write(message)
            for answer in MultiGenerationReply.FromString(message).response:
                if answer.error or answer.finish_reason not in ("", "none"):
                    running.discard(answer.index)

        try:
            await self._dispatcher.carry(shard, lambda link: call.stream(shard, link, write), call.name)
            return None
        except (ServerUnavailableError, grpc.aio.AioRpcError) as error:
            failure = _if_ours(error)
        if running:
            async with lock:
                await call.write(_failed(running, failure).SerializeToString())
        return failure

    @asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[_Call]:
        """A call from its beginning to its end, whatever ends it; errors become statuses."""
        task, code = asyncio.current_task(), grpc.StatusCode.OK
        assert task is not None
        call = self._running[task] = _Call(context)
        try:
            yield call
        except asyncio.CancelledError:
            code = grpc.StatusCode.UNAVAILABLE if self._ended else grpc.StatusCode.CANCELLED
            if not self._ended:
                raise
            await context.abort(*_status(ServerUnavailableError(self._ended)))
        except Exception as error:
            status = _status(error)
            code, call.writing_since = status[0], time.monotonic()  # the end, too, waits until the caller has room
            await context.abort(*status)
        finally:
            del self._running[task]
            self._calls[code.name] += 1

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


def _if_ours(error: Exception) -> Exception:
    """An error that is not the caller's, who gets the other answers; one that is ends the whole call."""
    if isinstance(error, grpc.aio.AioRpcError) and error.code() not in _OURS:
        raise error
    return error


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
