"""Requests over HTTP against a server that speaks byte by byte as it is told, well and badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mii.benchmark.serving.http_target import HttpTarget, api_of
from mii.benchmark.serving.load import Load, Packed, run_load
from mii.benchmark.serving.target import TargetSpec
from mii.benchmark.serving.trace import Trace
from mii.benchmark.serving.work import Ask

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = Ask([1, 2, 3], 3, 4)


class Server:
    """Reads requests and has `handler` write the answers."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.headers: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length"))
                self.headers.append(head)
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self.handler(self.bodies[-1], writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def run(self, spec: Callable[[int], TargetSpec], count: int = 1, clients: int = 1) -> list[Trace]:
        """What the requests came to."""

        async def main() -> list[Trace]:
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            target = HttpTarget(spec(server.sockets[0].getsockname()[1]))
            try:
                requests = [Packed(target.pack(ASK), ASK.prompt_tokens, ASK.new_tokens) for _ in range(count)]
                return (await run_load(target, requests, Load(clients=clients), exact=True)).traces
            finally:
                await target.close()
                server.close()

        return asyncio.run(main())


def completions(**options: Any) -> Callable[[int], TargetSpec]:
    def spec(port: int) -> TargetSpec:
        return TargetSpec("completions", f"http://127.0.0.1:{port}/v1/completions", model="demo", **options)

    return spec


def mii(port: int) -> TargetSpec:
    return TargetSpec("mii", f"http://127.0.0.1:{port}/mii/demo")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(message: Any) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": None}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}})
DONE = b"data: [DONE]\n\n"


async def answer_in_pieces(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Events that are cut in two, that come together, that have line ends of both kinds."""
    writer.write(HEAD)
    first = text("ab")
    for part in (first[:9], first[9:], text("c") + text("d").replace(b"\n", b"\r\n"), USAGE, DONE):
        writer.write(chunk(part))
        await writer.drain()
        await asyncio.sleep(0.01)
    writer.write(b"0\r\n\r\n")


def test_tokens_are_counted_however_events_are_cut() -> None:
    server = Server(answer_in_pieces)
    traces = server.run(completions(options={"temperature": 0}, api_key="secret"), count=6, clients=2)
    assert [(trace.kind, trace.prompt_tokens, trace.tokens) for trace in traces] == [("", 5, 4)] * 6
    assert all(trace.counts == [2, 1, 1] for trace in traces)
    assert all(trace.times[1] - trace.times[0] > 0.005 and trace.times[1] == trace.times[2] for trace in traces)
    assert server.connections == 2
    assert server.bodies[0] == {
        "model": "demo",
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "authorization: bearer secret" in server.headers[0].lower()


def test_without_a_count_each_event_is_a_token() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"".join(chunk(text("long words")) for _ in range(4)) + chunk(DONE) + b"0\r\n\r\n")

    (trace,) = Server(answer).run(completions())
    assert (trace.kind, trace.counts, trace.prompt_tokens) == ("", [1, 1, 1, 1], 3)


def test_an_answer_that_is_not_streamed_is_one_piece() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 5, "completion_tokens": 4}
        whole = json.dumps({"choices": [{"text": "abcd"}], "usage": usage}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(whole), whole))

    server = Server(answer)
    (trace,) = server.run(completions(stream=False))
    assert (trace.kind, trace.counts, trace.prompt_tokens) == ("", [4], 5)
    assert server.bodies[0]["stream"] is False and "stream_options" not in server.bodies[0]


def test_the_events_of_mii_count_their_tokens() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for length, reason in ((1, "none"), (3, "none"), (4, "none"), (4, "length")):
            piece = {"generated_text": "x", "prompt_length": 3, "generated_length": length, "finish_reason": reason}
            writer.write(chunk(event([{**piece, "index": 0}])))
        writer.write(b"0\r\n\r\n")

    server = Server(answer)
    (trace,) = server.run(mii)
    assert (trace.kind, trace.counts) == ("", [1, 2, 1])
    assert server.bodies[0] == {"prompts": [[1, 2, 3]], "max_new_tokens": 4, "stream": True}


def test_chats_have_text() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        parts = ({"role": "assistant", "content": ""}, {"content": "ab"}, {"content": "cd"}, {})
        deltas = [event({"choices": [{"index": 0, "delta": delta}]}) for delta in parts]
        writer.write(HEAD + chunk(b"".join(deltas)) + chunk(USAGE) + b"0\r\n\r\n")

    spec = TargetSpec("chat", "http://127.0.0.1:1/v1/chat/completions", model="demo")
    packed = json.loads(HttpTarget(spec).pack(Ask("Hello", 2, 4)))
    assert packed["messages"] == [{"role": "user", "content": "Hello"}]
    (trace,) = Server(answer).run(
        lambda port: TargetSpec("chat", f"http://127.0.0.1:{port}/v1/chat/completions", model="demo")
    )
    assert (trace.kind, trace.counts) == ("", [2, 2])


async def busy(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")


async def hang_up(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(text("a")))
    await writer.drain()
    writer.close()


async def hang_up_at_once(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.close()


async def fail_midway(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(
        HEAD + chunk(text("a")) + chunk(event({"error": {"message": "lost"}, "message": "the engine is lost"}))
    )
    writer.write(b"0\r\n\r\n")


async def say_nothing(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def nonsense(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail server\r\n\r\n")


async def no_json(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(b"data: {oh\n\n") + b"0\r\n\r\n")


async def early_end(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(text("a")) + chunk(DONE) + b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("handler", "kind", "words"),
    [
        (busy, "HTTP 429", "busy"),
        (hang_up, "connection lost", "closed"),
        (hang_up_at_once, "connection lost", "closed"),
        (fail_midway, "error event", "the engine is lost"),
        (say_nothing, "timeout", "0.2 s"),
        (nonsense, "broken answer", "no HTTP answer"),
        (no_json, "broken answer", "{oh"),
        (early_end, "short answer", "1 tokens came of 4"),
    ],
)
def test_errors_are_told_apart(handler: Handler, kind: str, words: str) -> None:
    traces = Server(handler).run(completions(timeout=0.2 if handler is say_nothing else 60), count=2)
    assert [trace.kind for trace in traces] == [kind, kind]
    assert all(words in trace.message for trace in traces)


def test_nobody_there_is_an_error_of_each_request() -> None:
    async def main() -> list[Trace]:
        target = HttpTarget(completions()(1))
        return (await run_load(target, [Packed(b"{}", 1, 1)] * 2, Load(clients=1), exact=True)).traces

    assert [trace.kind for trace in asyncio.run(main())] == ["no connection"] * 2


def test_a_connection_that_was_closed_while_it_lay_idle_is_made_again() -> None:
    async def answer_and_close(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await answer_in_pieces(body, writer)
        await writer.drain()
        writer.close()

    server = Server(answer_and_close)
    traces = server.run(completions(), count=5)
    assert [trace.kind for trace in traces] == [""] * 5 and server.connections == 5


@pytest.mark.parametrize(
    ("url", "api"),
    [
        ("http://h:1/v1/completions", "completions"),
        ("https://h/v1/chat/completions?x=1", "chat"),
        ("http://h/mii/a%20name", "mii"),
    ],
)
def test_the_path_says_the_api(url: str, api: str) -> None:
    assert api_of(url) == api


def test_other_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="neither /completions"):
        api_of("http://h/v1/models")
    with pytest.raises(ValueError, match="no URL"):
        HttpTarget(TargetSpec("completions", "localhost:8000/v1/completions"))
