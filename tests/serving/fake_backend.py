"""A load balancer for tests of HTTP servers: real gRPC, answers that follow from the prompts, and prompts that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import httpx
from fastapi import FastAPI

from mii.batching.generation.params import GenerateParamsConfig
from mii.entrypoints.http.server import HttpServer, TlsFiles, listen
from mii.entrypoints.http.settings import HttpSettings
from mii.errors import AccessError, GenerationError, PromptTooLongError, ServerBusyError, ServerUnavailableError
from mii.grpc_related.conversations import CHAT
from mii.grpc_related.convert import prompts_of, unpack_options
from mii.grpc_related.options import REQUEST_ID, SERVER_OPTIONS, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import (
    CallEnd,
    CallerMessage,
    CallReply,
    CallStart,
    HealthReply,
    MultiGenerationReply,
    MultiStringRequest,
    ReplicaHealth,
    ServerMessage,
    SingleGenerationReply,
    StatsReply,
    TokenLogprob,
)
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseServicer, add_ModelResponseServicer_to_server
from mii.grpc_related.statuses import NO_RETRY, status_of
from mii.grpc_related.trunk import end_of
from mii.launch.loop import run
from tests.serving.deployments import PATIENCE_SECONDS, wait_until

__all__ = ["FakeBackend", "HttpFixture", "answer_of", "serving"]

TOKEN_OF_DEPLOYMENT = "secret-token"
LONGEST = 200  # tokens of an answer
WORDS = ["one", " two", " thrée", ' "four"\n', " five"]
STATS = {
    "balancer": {"calls": {"OK": 3}, "retries": 1, "held_calls": 0, "running_calls": 0, "replicas": 2},
    "replicas": [
        {
            "replica": index,
            "ready": True,
            "outstanding": 4 + index,
            "queue_size": 64,
            "engine": {
                "running": 3,
                "waiting": 1,
                "free_blocks": 25,
                "num_blocks": 100,
                "preemptions": 2,
                "prefix_hit_tokens": 7,
                "prefix_queried_tokens": 9,
                "steps": 11,
            },
            "calls": {"OK": 5, "CANCELLED": 1},
            "finished": {"stop": 4},
            "prompt_tokens": 50,
            "generated_tokens": 60,
            "engine_losses": 0,
            "first_token_seconds": {"bounds": [0.1, 1.0], "counts": [3, 1, 1], "sum": 4.5, "count": 5},
            "token_seconds": {"bounds": [0.1], "counts": [1, 0], "sum": 0.05, "count": 1},
            "request_seconds": {"bounds": [0.1], "counts": [0, 2], "sum": 9.0, "count": 2},
        }
        for index in range(2)
    ],
}


def answer_of(tokens: int) -> str:
    """The text of an answer of so many tokens."""
    return "".join(WORDS[position % len(WORDS)] for position in range(tokens))


class FakeBackend(ModelResponseServicer):
    """Answers like a deployment. A prompt that begins with "!" fails in the way that it names.

    `calls` has what came: prompts, options, metadata. `cancelled` counts calls that ended before they were answered.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], dict[str, Any], dict[str, str]]] = []
        self.cancelled = 0
        self.terminated = 0
        self.ready = True
        self.address = ""

    async def GeneratorReply(self, request: MultiStringRequest, context: Any) -> MultiGenerationReply:
        async with self._call(request, context) as (prompts, params, chats):
            if "!slow" in prompts:
                await asyncio.sleep(30)
            answers = [self._whole(index, prompt, params, chats) for index, prompt in enumerate(prompts)]
            return MultiGenerationReply(response=answers)
        raise AssertionError

    async def GeneratorReplyStream(
        self, request: MultiStringRequest, context: Any
    ) -> AsyncIterator[MultiGenerationReply]:
        async with self._call(request, context) as (prompts, params, chats):
            tokens = 10**9 if "!slow" in prompts else params.max_new_tokens
            for position in range(tokens):
                if position == 2 and "!dies" in prompts:
                    raise ServerUnavailableError("the engine that ran this request is lost")
                pieces = [_piece(index, prompt, position, params, chats) for index, prompt in enumerate(prompts)]
                yield MultiGenerationReply(response=pieces)
                await asyncio.sleep(0.02 if "!slow" in prompts else 0)
            yield MultiGenerationReply(
                response=[_last(index, prompt, params, chats) for index, prompt in enumerate(prompts)]
            )

    async def Multiplex(self, messages: AsyncIterator[CallerMessage], context: Any) -> AsyncIterator[ServerMessage]:
        calls: dict[int, asyncio.Task[None]] = {}
        said: asyncio.Queue[ServerMessage] = asyncio.Queue()

        async def read() -> None:
            async for message in messages:
                for start in message.starts:
                    calls[start.call] = asyncio.ensure_future(self._run(start, said))
                for number in message.cancels:
                    calls[number].cancel()

        reading = asyncio.ensure_future(read())
        try:
            while True:
                yield await said.get()
        finally:
            for task in (reading, *calls.values()):
                task.cancel()

    async def _run(self, start: CallStart, said: asyncio.Queue[ServerMessage]) -> None:
        context = _CallContext(start.request_id)
        request = MultiStringRequest.FromString(start.request)
        try:
            async with contextlib.aclosing(self.GeneratorReplyStream(request, context)) as replies:
                async for reply in replies:
                    for piece in reply.response:
                        piece.index = request.positions[0]
                        if piece.error:
                            await context.abort(*status_of(GenerationError(piece.error)))
                    said.put_nowait(ServerMessage(replies=[CallReply(call=start.call, response=reply.response)]))
            said.put_nowait(ServerMessage(ends=[CallEnd(call=start.call)]))
        except _Aborted as aborted:
            said.put_nowait(ServerMessage(ends=[end_of(start.call, *aborted.status)]))

    async def Health(self, request: Any, context: Any) -> HealthReply:
        reason = "" if self.ready else "replica 0: no engine"
        return HealthReply(ready=self.ready, reason=reason, replicas=[ReplicaHealth(ready=self.ready)])

    async def Stats(self, request: Any, context: Any) -> StatsReply:
        return StatsReply(json=json.dumps(STATS).encode())

    async def Terminate(self, request: Any, context: Any) -> Any:
        if dict(context.invocation_metadata()).get(TOKEN) != TOKEN_OF_DEPLOYMENT:
            await context.abort(*status_of(AccessError("only who has the token may end it")))
        self.terminated += 1
        return type(request)()

    @contextlib.asynccontextmanager
    async def _call(
        self, request: MultiStringRequest, context: Any
    ) -> AsyncIterator[tuple[list[Any], GenerateParamsConfig, bool]]:
        prompts, options = list(prompts_of(request)), unpack_options(request)
        self.calls.append((prompts, dict(options), dict(context.invocation_metadata())))
        try:
            chat = options.pop(CHAT, None)
            _fail_as_asked(prompts)
            params = GenerateParamsConfig(**{"max_new_tokens": 3, **options})
            if params.max_new_tokens is None or params.max_new_tokens > LONGEST:
                params.max_new_tokens = LONGEST
            yield prompts, params, chat is not None
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        except (grpc.aio.AbortError, _Aborted):
            raise
        except Exception as error:
            code, details, metadata = status_of(error)
            await context.abort(code, details, (*metadata, NO_RETRY))

    def _whole(self, index: int, prompt: Any, params: GenerateParamsConfig, chat: bool) -> SingleGenerationReply:
        answer = _last(index, prompt, params, chat)
        answer.response = answer_of(answer.generated_tokens)
        if params.return_full_text:
            answer.response = (prompt if isinstance(prompt, str) else _text_of(prompt)) + answer.response
        if prompt == "!breaks":
            answer.finish_reason, answer.error = "error", "the engine could not go on"
        if params.logprobs is not None:
            answer.logprobs.extend(_logprob(WORDS[at % 5], params.logprobs) for at in range(answer.generated_tokens))
        if params.prompt_logprobs is not None:
            answer.prompt_logprobs.extend(_prompt_logprobs(prompt, params.prompt_logprobs))
        return answer


class _Aborted(Exception):
    """A call in a stream of many has ended with a status."""

    def __init__(self, status: Any) -> None:
        self.status = status


class _CallContext:
    """What a handler sees of a call in a stream of many."""

    def __init__(self, name: str) -> None:
        self._name = name

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, self._name),)

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        raise _Aborted((code, details, metadata))


def _fail_as_asked(prompts: list[Any]) -> None:
    if "!busy" in prompts:
        busy = ServerBusyError("the queue is full")
        busy.retry_after = 2.5
        raise busy
    if "!gone" in prompts:
        raise ServerUnavailableError("no replica is there")
    if "!long" in prompts:
        raise PromptTooLongError("the prompt has 9 tokens and 8 are allowed")
    if "!wrong" in prompts:
        raise GenerationError("the engine is wrong")


def _piece(index: int, prompt: Any, position: int, params: GenerateParamsConfig, chat: bool) -> SingleGenerationReply:
    if prompt == "!breaks" and position == 1:
        return SingleGenerationReply(index=index, finish_reason="error", error="the engine could not go on")
    word = WORDS[position % len(WORDS)]
    piece = SingleGenerationReply(
        response=word,
        finish_reason="none",
        index=index,
        prompt_tokens=_length(prompt, chat),
        generated_tokens=position + 1,
    )
    if params.logprobs is not None:
        piece.logprobs.append(_logprob(word, params.logprobs))
    return piece


def _last(index: int, prompt: Any, params: GenerateParamsConfig, chat: bool) -> SingleGenerationReply:
    return SingleGenerationReply(
        finish_reason="length",
        index=index,
        prompt_tokens=_length(prompt, chat),
        generated_tokens=params.max_new_tokens,
    )


def _length(prompt: Any, chat: bool) -> int:
    """Tokens of a prompt: a word each, of a conversation also one for each turn."""
    if chat:
        return sum(1 + len((turn["content"] or "").split()) for turn in json.loads(prompt))
    return len(prompt.split() if isinstance(prompt, str) else prompt)


def _text_of(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def _logprob(word: str, count: int) -> TokenLogprob:
    top = [TokenLogprob(token_id=at, token=f"t{at}".encode(), logprob=-1.0 - at) for at in range(count)]
    return TokenLogprob(token_id=7, token=word.encode(), logprob=-0.5, top=top)


def _prompt_logprobs(prompt: Any, count: int) -> list[TokenLogprob]:
    words = prompt.split() if isinstance(prompt, str) else [f"<{token}>" for token in prompt]
    entries = [_logprob(word, count) for word in words]
    for entry in entries[:1]:
        entry.ClearField("logprob")
        entry.ClearField("top")
    return entries


class HttpFixture:
    """An HTTP server in a thread of its own, over a `FakeBackend`.

    Args:
        url: where it answers.
        fake: the backend.
    """

    def __init__(self, url: str, fake: FakeBackend) -> None:
        self.url, self.fake = url, fake
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_SECONDS)

    @property
    def options(self) -> dict[str, Any]:
        """The generation options of the last call."""
        return self.fake.calls[-1][1]

    def wait_cancelled(self, count: int = 1) -> None:
        """Until so many calls have been cancelled at the backend."""
        wait_until(lambda: self.fake.cancelled >= count, seen=lambda: (self.fake.cancelled, count))


@contextlib.contextmanager
def serving(
    make_app: Callable[[HttpSettings], FastAPI], tls: TlsFiles | None = None, **settings: Any
) -> Iterator[HttpFixture]:
    """An HTTP server that answers, and is gone afterwards."""
    fake = FakeBackend()
    sockets = listen("127.0.0.1", 0)
    servers: list[HttpServer] = []

    async def main() -> None:
        backend = grpc.aio.server(options=SERVER_OPTIONS)
        add_ModelResponseServicer_to_server(fake, backend)
        port = backend.add_insecure_port("127.0.0.1:0")
        await backend.start()
        fake.address = f"127.0.0.1:{port}"
        given = {"balancer": fake.address, "model": "tiny", "deployment": "a b/c", **settings}
        own = HttpSettings(**given)
        servers.append(HttpServer(make_app(own), sockets, tls=tls, drain_seconds=0.5))
        await servers[0].serve()
        await backend.stop(0)

    port = sockets[0].getsockname()[1]
    thread = threading.Thread(target=run, args=(main(),), daemon=True)
    thread.start()
    wait_until(lambda: not thread.is_alive() or (bool(servers) and servers[0].started))
    assert thread.is_alive()
    fixture = HttpFixture(f"{'https' if tls else 'http'}://127.0.0.1:{port}", fake)
    try:
        yield fixture
    finally:
        fixture.http.close()
        servers[0].stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
