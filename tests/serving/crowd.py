"""Clients that keep asking a deployment of stand-in engines, over gRPC and HTTP, and check every answer they get."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mii.backend import MIIClient
from mii.benchmark.serving.http_stream import Connections
from mii.benchmark.serving.trace import Failed
from mii.config import MIIConfig
from mii.errors import MIIError
from tests.serving.standin import answer

__all__ = ["WAYS", "Crowd", "Outcome", "crowd", "http_options", "stand_in_text"]

WAYS = ("grpc stream", "grpc", "http stream", "http")
_LONGEST_SECONDS = 40.0
_BYTES_BEFORE = 3 - ord("!")  # the byte tokenizer of tests.checkpoints: token of a printable character less its code


def stand_in_text(prompt: str, tokens: int) -> str:
    """What a stand-in engine answers to a prompt of printable characters."""
    ids = [ord(character) + _BYTES_BEFORE for character in prompt]
    return "".join(chr(answer(ids, position) - _BYTES_BEFORE) for position in range(tokens))


def http_options() -> dict[str, Any]:
    """Options of a deployment that answers HTTP too, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"enable_restful_api": True, "restful_api_port": probe.getsockname()[1]}


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
        address = f"http://127.0.0.1:{self._config.restful_api_port}/mii/{quote(self._config.deployment_name)}"
        http = Connections(address, {})
        async with MIIClient(self._config) as client:
            ways = itertools.islice(itertools.cycle(self._ways), self._clients)
            await asyncio.gather(*(self._run(way, client, http) for way in ways))
        http.close()

    async def _run(self, way: str, client: MIIClient, http: Connections) -> None:
        while not self._stop.is_set():
            began, number = time.monotonic(), next(self._numbers)
            prompt, texts, error = f"{way.replace(' ', '-')}-{number}", [], ""
            try:
                if way.startswith("grpc"):
                    await self._grpc(way, client, prompt, texts)
                else:
                    await self._http(way, http, prompt, texts)
            except MIIError as failure:
                error = f"{type(failure).__name__}: {failure}"
            except Failed as failure:
                error = f"{failure.kind}: {failure}"
            text, expected = "".join(texts), stand_in_text(prompt, self._tokens)
            right = expected.startswith(text) if error else text == expected
            self.outcomes.append(Outcome(way, began, time.monotonic(), error, right))
            if error:
                await asyncio.sleep(0.05)

    async def _grpc(self, way: str, client: MIIClient, prompt: str, texts: list[str]) -> None:
        if way == "grpc":
            responses = await client.generate_async(prompt, timeout=_LONGEST_SECONDS, **self._options())
            texts.extend(response.generated_text for response in responses or ())
            return
        async for pieces in client.astream(prompt, timeout=_LONGEST_SECONDS, **self._options()):
            texts.extend(piece.generated_text for piece in pieces)

    async def _http(self, way: str, http: Connections, prompt: str, texts: list[str]) -> None:
        streams, body = way == "http stream", bytearray()
        request = {"prompts": [prompt], "stream": streams, **self._options()}
        try:
            await http.post(json.dumps(request).encode(), lambda data, now: body.extend(data), _LONGEST_SECONDS)
        finally:
            whole = bytes(body).decode()
            messages = _events(whole) if streams else [json.loads(whole)] if whole else []
            for message in messages:
                if isinstance(message, dict):
                    raise Failed("error event", message["message"])
                texts.extend(piece["generated_text"] for piece in message)

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self._tokens, "ignore_eos": True, "do_sample": False}


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
