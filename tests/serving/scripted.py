"""A gRPC server that follows a script, and a load balancer in this process: for what real replicas do too rarely."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from mii.grpc_related.balancer_server import BalancerServer
from mii.grpc_related.options import REQUEST_ID, SERVER_OPTIONS, SERVICE_NAME, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import (
    CallEnd,
    CallReply,
    HealthReply,
    MultiGenerationReply,
    MultiStringRequest,
    ReplicaHealth,
    ServerMessage,
    SingleGenerationReply,
    StatsReply,
)
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseServicer, add_ModelResponseServicer_to_server

__all__ = ["Balancer", "Scripted", "balancing", "echo", "ends_with", "scripted"]

Script = Callable[[Any, Any, int], Iterator[MultiGenerationReply]]


def echo(request: Any, context: Any, call: int) -> Iterator[MultiGenerationReply]:
    """A script that answers with the prompts themselves, all pieces first and then all ends."""
    texts = [*request.request, *(str(list(prompt.ids)) for prompt in request.token_prompts)]
    places = list(request.positions) or list(range(len(texts)))
    for finish_reason in ("none", "stop"):
        pairs = zip(places, texts if finish_reason == "none" else [""] * len(texts), strict=True)
        yield MultiGenerationReply(
            response=[
                SingleGenerationReply(response=text, finish_reason=finish_reason, index=place, generated_tokens=1)
                for place, text in pairs
            ]
        )


def ends_with(code: grpc.StatusCode, *metadata: tuple[str, str], until: int = 1_000_000, after: int = 0) -> Script:
    """A script in which the first `until` calls end so, after some messages; later ones are answered."""

    def script(request: Any, context: Any, call: int) -> Iterator[MultiGenerationReply]:
        if call > until:
            yield from echo(request, context, call)
            return
        for _, reply in zip(range(after), echo(request, context, call), strict=False):
            yield reply
        context.set_trailing_metadata(metadata)
        context.abort(code, "as the script says")

    return script


class AbortedError(Exception):
    """A script ends its call."""


class SharedContext:
    """What scripts see of a call in a stream of many.

    Args:
        request_id: the call's.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id, self._over = request_id, threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self.trailing: tuple[tuple[str, str], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, self._request_id),)

    def add_callback(self, callback: Callable[[], object]) -> bool:
        self._callbacks.append(callback)
        return self.is_active()

    def is_active(self) -> bool:
        return not self._over.is_set()

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.trailing = metadata

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise AbortedError(code, details)

    def end(self) -> None:
        """The call is over."""
        self._over.set()
        for callback in self._callbacks:
            callback()


class Scripted(ModelResponseServicer):
    """A replica, or a whole deployment. Runs its script at each call."""

    def __init__(self) -> None:
        self.script: Script = echo
        self.requests: list[Any] = []
        self.contexts: list[Any] = []
        self.tokens: list[str] = []
        self.ready: Callable[[], bool] = lambda: True
        self.server: Any = None
        self.port = 0
        self.health = HealthServicer()
        self.serve(True)

    @property
    def calls(self) -> int:
        return len(self.requests)

    def serve(self, ready: bool) -> None:
        """Says whether it is well, to those that watch."""
        states = health_pb2.HealthCheckResponse
        self.health.set(SERVICE_NAME, states.SERVING if ready else states.NOT_SERVING)

    def GeneratorReplyStream(self, request: Any, context: Any) -> Iterator[MultiGenerationReply]:
        self.requests.append(request)
        self.contexts.append(context)
        yield from self.script(request, context, self.calls)

    def Multiplex(self, messages: Iterator[Any], context: Any) -> Iterator[ServerMessage]:
        """Each call in a thread of its own."""
        said: queue.Queue[ServerMessage | None] = queue.Queue()
        calls: dict[int, SharedContext] = {}

        def end_all() -> None:
            for call in list(calls.values()):
                call.end()
            said.put(None)

        def listen() -> None:
            with contextlib.suppress(Exception):
                for message in messages:
                    for start in message.starts:
                        calls[start.call] = SharedContext(start.request_id)
                        threading.Thread(target=self._run, args=(start, calls[start.call], said.put)).start()
                    for number in message.cancels:
                        calls[number].end()

        if not context.add_callback(end_all):
            return
        threading.Thread(target=listen).start()
        yield from iter(said.get, None)

    def _run(self, start: Any, context: SharedContext, say: Callable[[ServerMessage], object]) -> None:
        end = CallEnd(call=start.call)
        try:
            for reply in self.GeneratorReplyStream(MultiStringRequest.FromString(start.request), context):
                if not context.is_active():
                    break
                say(ServerMessage(replies=[CallReply(call=start.call, response=reply.response)]))
        except AbortedError as aborted:
            code, details = aborted.args
            end = CallEnd(call=start.call, code=code.value[0], details=details, metadata=dict(context.trailing))
        finally:
            say(ServerMessage(ends=[end]))
            context.end()

    def GeneratorReply(self, request: Any, context: Any) -> MultiGenerationReply:
        self.requests.append(request)
        self.contexts.append(context)
        return next(iter(self.script(request, context, self.calls)))

    def Health(self, request: Any, context: Any) -> HealthReply:
        ready = self.ready()
        reason = "" if ready else "it is loading"
        return HealthReply(
            ready=ready, reason=reason, replicas=[ReplicaHealth(ready=ready, reason=reason, device="cpu")]
        )

    def Stats(self, request: Any, context: Any) -> StatsReply:
        return StatsReply(json=b'{"outstanding": 3}')

    def Terminate(self, request: Any, context: Any) -> Empty:
        self.tokens.append(dict(context.invocation_metadata()).get(TOKEN, ""))
        if self.tokens[-1] != "secret":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no token")
        return Empty()


@contextlib.contextmanager
def scripted(servicer: Scripted, port: int = 0, options: Sequence[tuple[str, int]] = ()) -> Iterator[int]:
    """Serves it; yields the port."""
    server = servicer.server = grpc.server(ThreadPoolExecutor(16), options=[*options, *SERVER_OPTIONS])
    add_ModelResponseServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    servicer.port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield servicer.port
    finally:
        server.stop(0).wait()


class Balancer:
    """A load balancer in a thread of this process.

    Args:
        addresses: of the replicas.
        queue_size: of each.
        options: of `BalancerServer`.
    """

    def __init__(self, addresses: Sequence[str], queue_size: int, **options: Any) -> None:
        self.ended: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="balancer")
        self._thread.start()
        self.port = self._run(self._start(addresses, queue_size=queue_size, **options))
        self.address = f"127.0.0.1:{self.port}"

    async def _start(self, addresses: Sequence[str], **options: Any) -> int:
        self.server = BalancerServer(addresses, token="secret", terminate=self.ended.append, **options)
        return await self.server.start("127.0.0.1:0")

    def set_replicas(self, addresses: Sequence[str]) -> None:
        """See `BalancerServer.set_replicas`."""

        async def work() -> None:
            self.server.set_replicas(addresses)
            await self.server.wait_all_ready()

        self._run(work())

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Drains and ends it."""
        if self._thread.is_alive():
            self._run(self.server.stop(drain_seconds))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)


@contextlib.contextmanager
def balancing(addresses: Sequence[str], queue_size: int = 100, **options: Any) -> Iterator[Balancer]:
    """A load balancer that is gone afterwards."""
    balancer = Balancer(addresses, queue_size, **options)
    try:
        yield balancer
    finally:
        balancer.stop()
