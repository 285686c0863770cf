"""Clients that keep asking a deployment of stand-in engines, over gRPC and HTTP, and check every answer they get."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mii.backend import MIIClient
from mii.batching.data_classes import Response
from mii.benchmark.serving.http_stream import Connections
from mii.benchmark.serving.trace import Failed
from mii.config import MIIConfig
from mii.errors import MIIError
from tests.serving.deployments import free_port
from tests.serving.standin import answer

__all__ = ["WAYS", "Answer", "Asker", "Crowd", "Outcome", "asking", "crowd", "http_options", "stand_in_text"]

WAYS = ("grpc stream", "grpc", "http stream", "http")
_LONGEST_SECONDS = 40.0
_BYTES_BEFORE = 3 - ord("!")  # the byte tokenizer of tests.checkpoints: token of a printable character less its code


def stand_in_text(prompt: str, tokens: int) -> str:
    """What a stand-in engine answers to a prompt of printable characters."""
    ids = [ord(character) + _BYTES_BEFORE for character in prompt]
    return "".join(chr(answer(ids, position) - _BYTES_BEFORE) for position in range(tokens))


def http_options() -> dict[str, Any]:
    """Options of a deployment that answers HTTP too, on a port that is free."""
    return {"enable_restful_api": True, "restful_api_port": free_port(1)}


@dataclass(frozen=True)
class Outcome:
    """How one call went.

    Args:
        way: one of `WAYS`.
        began: by `time.monotonic`.
        ended: by `time.monotonic`.
        error: the kind of error and its words; empty: there is an answer.
        right: whether all that came is what the stand-in says: the whole answer, or the beginning of it and an error.
    """

    way: str
    began: float
    ended: float
    error: str
    right: bool

    @property
    def good(self) -> bool:
        return self.right and not self.error


class Crowd:
    """Runs in a thread of its own. Each client asks, waits for the end, and asks again.

    Args:
        config: of the deployment.
        clients: how many; they take turns in how they ask.
        tokens: of each answer.
        ways: how they ask.
    """

    def __init__(self, config: MIIConfig, clients: int, tokens: int, ways: Iterable[str] = WAYS) -> None:
        self._config, self._clients, self._tokens, self._ways = config, clients, tokens, tuple(ways)
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="crowd")
        self.outcomes: list[Outcome] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> list[Outcome]:
        """Lets the calls that run end; returns all outcomes."""
        self._stop.set()
        self._thread.join(2 * _LONGEST_SECONDS)
        assert not self._thread.is_alive(), "a call did not end"
        return self.outcomes

    def since(self, moment: float) -> list[Outcome]:
        """The calls that began after `moment` and have ended."""
        return [outcome for outcome in list(self.outcomes) if outcome.began >= moment]

    async def _main(self) -> None:
        async with asking(self._config) as asker:
            ways = itertools.islice(itertools.cycle(self._ways), self._clients)
            await asyncio.gather(*(self._run(way, asker) for way in ways))

    async def _run(self, way: str, asker: Asker) -> None:
        options = {"max_new_tokens": self._tokens, "ignore_eos": True, "do_sample": False}
        while not self._stop.is_set():
            began, number = time.monotonic(), next(self._numbers)
            prompt, error = f"{way.replace(' ', '-')}-{number}", ""
            answers: dict[int, Answer] = {}
            try:
                await asker.ask(way, [prompt], options, answers)
            except MIIError as failure:
                error = f"{type(failure).__name__}: {failure}"
            except Failed as failure:
                error = f"{failure.kind}: {failure}"
            text, expected = answers[0].text if answers else "", stand_in_text(prompt, self._tokens)
            right = expected.startswith(text) if error else text == expected
            self.outcomes.append(Outcome(way, began, time.monotonic(), error, right))
            if error:
                await asyncio.sleep(0.05)


@dataclass
class Answer:
    """An answer, or what there is of it."""

    text: str = ""
    prompt_length: int = 0
    length: int = 0
    reason: str = "none"

    def add(self, text: str, prompt_length: int, length: int, reason: str) -> None:
        self.text += text
        self.prompt_length, self.length, self.reason = prompt_length, length, reason


class Asker:
    """Asks a deployment in one of the `WAYS`.

    Args:
        client: of the deployment.
        http: connections to its gateway.
    """

    def __init__(self, client: MIIClient, http: Connections) -> None:
        self._client, self._http = client, http

    async def ask(self, way: str, prompts: list[Any], options: dict[str, Any], answers: dict[int, Answer]) -> None:
        """Puts what comes into `answers`, by the prompts' places, until all is there.

        Raises:
            MIIError: over gRPC, what went wrong.
            Failed: over HTTP, what went wrong.
        """
        if way == "grpc stream":
            async for pieces in self._client.astream(prompts, timeout=_LONGEST_SECONDS, **options):
                for piece in pieces:
                    _add(answers, piece.index, piece)
        elif way == "grpc":
            responses = await self._client.generate_async(prompts, timeout=_LONGEST_SECONDS, **options)
            for index, response in enumerate(responses or ()):
                _add(answers, index, response)
        else:
            await self._post(way == "http stream", {"prompts": prompts, **options}, answers)

    async def _post(self, streams: bool, request: dict[str, Any], answers: dict[int, Answer]) -> None:
        body = bytearray()
        payload = json.dumps({**request, "stream": streams}).encode()
        try:
            await self._http.post(payload, lambda data, now: body.extend(data), _LONGEST_SECONDS)
        finally:
            whole = bytes(body).decode()
            for message in _events(whole) if streams else [json.loads(whole)] if whole else []:
                if isinstance(message, dict):
                    raise Failed("error event", message["message"])
                for place, fields in enumerate(message):
                    names = ("generated_text", "prompt_length", "generated_length", "finish_reason")
                    values = [fields[name] for name in names]
                    answers.setdefault(fields.get("index", place), Answer()).add(*values)


@asynccontextmanager
async def asking(config: MIIConfig) -> AsyncIterator[Asker]:
    """Asks a deployment that answers HTTP too."""
    http = Connections(f"http://127.0.0.1:{config.restful_api_port}/mii/{quote(config.deployment_name)}", {})
    async with MIIClient(config) as client:
        yield Asker(client, http)
    http.close()


def _add(answers: dict[int, Answer], index: int, response: Response) -> None:
    answer = answers.setdefault(index, Answer())
    length, reason = response.generated_length, str(response.finish_reason.value)
    answer.add(response.generated_text, response.prompt_length, length, reason)


def _events(text: str) -> list[Any]:
    """The messages of whole events; what was cut off is left out."""
    whole = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [json.loads(event) for event in whole if event != "[DONE]"]


@contextmanager
def crowd(config: MIIConfig, clients: int, tokens: int, ways: Iterable[str] = WAYS) -> Iterator[Crowd]:
    """Clients that ask while the block runs; when it ends, every call must have ended."""
    running = Crowd(config, clients, tokens, ways)
    running.start()
    try:
        yield running
    finally:
        running.stop()
