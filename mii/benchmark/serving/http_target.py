"""Requests over HTTP: mii's own route, OpenAI's completions and its chat completions, of any server that has them."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from mii.benchmark.serving.http_stream import Connections
from mii.benchmark.serving.target import TargetSpec
from mii.benchmark.serving.trace import Failed, Trace, share_out
from mii.benchmark.serving.work import Ask

__all__ = ["HttpTarget", "api_of"]

_encode = msgspec.json.Encoder().encode


class _Content(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Content | None = None
    message: _Content | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Response(msgspec.Struct):
    prompt_length: int
    generated_length: int
    error: str = ""


class _Failure(msgspec.Struct):
    message: str


class _Completion(msgspec.Struct):
    """What is read of OpenAI's answers and events; everything else is skipped."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    message: Any = None


def api_of(url: str) -> str:
    """Which API a URL belongs to, by its path.

    Raises:
        ValueError: it is none that is known.
    """
    path = url.partition("?")[0].rstrip("/")
    for ending, api in (("/chat/completions", "chat"), ("/completions", "completions")):
        if path.endswith(ending):
            return api
    if "/mii/" in path:
        return "mii"
    raise ValueError(f"{url!r} ends in neither /completions nor /chat/completions and has no /mii/<name> in it")


class _Format(Protocol):
    """How an API writes requests and answers."""

    def body(self, ask: Ask) -> dict[str, Any]:
        """What a request has besides the options of all requests."""

    def read(self, data: bytes, trace: Trace) -> int:
        """Takes in an event, or a whole answer, as JSON; returns how much of the answer is in it, 0 where nothing is.

        Raises:
            msgspec.DecodeError: it is no such thing.
            Failed: it says that the request failed.
        """

    def finish(self, trace: Trace) -> None:
        """Turns what `read` returned, which is in the trace's counts, into tokens."""


class _MiiFormat:
    def body(self, ask: Ask) -> dict[str, Any]:
        return {"prompts": [ask.prompt], "max_new_tokens": ask.new_tokens}

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_Failure | list[_Response]).decode

    def read(self, data: bytes, trace: Trace) -> int:
        message, new = self._decode(data), 0
        if isinstance(message, _Failure):
            raise Failed("error event", message.message)
        for response in message:
            if response.error:
                raise Failed("GenerationError", response.error)
            trace.prompt_tokens = response.prompt_length
            new = max(new, response.generated_length - trace.tokens)
        return new

    def finish(self, trace: Trace) -> None:
        """They are tokens."""


class _OpenAiFormat:
    """Events do not say how many tokens they have: their characters share out the count that the last one gives."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._decode = msgspec.json.Decoder(_Completion).decode
        self._usage: dict[int, int] = {}

    def body(self, ask: Ask) -> dict[str, Any]:
        return {"model": self._model, "prompt": ask.prompt, "max_tokens": ask.new_tokens}

    def read(self, data: bytes, trace: Trace) -> int:
        message = self._decode(data)
        if message.error:
            raise Failed("error event", str(message.message or message.error))
        if message.usage is not None:
            trace.prompt_tokens = message.usage.prompt_tokens
            self._usage[id(trace)] = message.usage.completion_tokens
        return sum(len(self.text(choice)) for choice in message.choices)

    def finish(self, trace: Trace) -> None:
        total = self._usage.pop(id(trace), None)
        trace.counts = [1] * len(trace.times) if total is None else share_out(total, trace.counts)
        trace.tokens = sum(trace.counts)

    def text(self, choice: _Choice) -> str:
        return choice.text or ""


class _ChatFormat(_OpenAiFormat):
    def body(self, ask: Ask) -> dict[str, Any]:
        messages = [{"role": "user", "content": ask.prompt}]
        return {"model": self._model, "messages": messages, "max_tokens": ask.new_tokens}

    def text(self, choice: _Choice) -> str:
        content = choice.delta or choice.message
        return (content.content if content else None) or ""


def _format_of(spec: TargetSpec) -> _Format:
    if spec.api == "mii":
        return _MiiFormat()
    return _ChatFormat(spec.model) if spec.api == "chat" else _OpenAiFormat(spec.model)


class HttpTarget:
    """See `mii.benchmark.serving.target.Target`."""

    def __init__(self, spec: TargetSpec) -> None:
        self._spec, self._format = spec, _format_of(spec)
        self._common = {**spec.options, "stream": spec.stream}
        if spec.stream and spec.api != "mii":
            self._common["stream_options"] = {"include_usage": True}
        key = {"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
        self._connections = Connections(spec.address, key)

    def pack(self, ask: Ask) -> bytes:
        return _encode({**self._format.body(ask), **self._common})

    async def send(self, payload: bytes, trace: Trace) -> None:
        reader = _Reader(self._format, trace, self._spec.stream)
        try:
            await self._connections.post(payload, reader.take, self._spec.timeout)
            reader.end()
        finally:
            self._format.finish(trace)

    async def close(self) -> None:
        self._connections.close()


class _Reader:
    """Reads one answer: the lines of its events, or one JSON document."""

    def __init__(self, form: _Format, trace: Trace, stream: bool) -> None:
        self._form, self._trace, self._stream = form, trace, stream
        self._rest = b""
        self._arrived = 0.0

    def take(self, data: bytes, now: float) -> None:
        self._arrived = now
        self._rest += data
        if not self._stream:
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def end(self) -> None:
        if not self._stream:
            self._event(self._rest)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            amount = self._form.read(data, self._trace)
        except msgspec.DecodeError as error:
            raise Failed("broken answer", f"{error!r} in {data[:200]!r}") from None
        if amount > 0:
            self._trace.add(self._arrived, amount)
