"""An engine process without a model, for load tests: it emits tokens at a set rate, in the real engine's messages.

    python -m tests.serving.standin <folder of the deployment> replica-<i>-engine

Its options come from ``standin-<i>.json`` in the folder, where there is one (see `Options`). The answer to a prompt is
a function of the prompt alone (`answer`), so that a client can check every token it gets. When it stops it writes, if
asked to, when each token of each request left, by the clock that all processes share.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from mii.backend.engine_server import EngineServer
from mii.backend.messages import EngineInfo
from mii.batching.data_classes import EngineRequest, StepOutput, TokenOutput
from mii.errors import PromptTooLongError
from mii.launch.loop import settle
from mii.launch.process import Process

__all__ = ["Options", "StandIn", "answer", "main"]

# Of the byte tokenizer of tests.checkpoints: three special tokens come first, then the printable bytes from "!" on.
_LATEST_SECONDS = 0.25
_LETTERS = [3 + byte - ord("!") for byte in b"abcdefghijklmnopqrstuvwxyz"]


class Options(msgspec.Struct):
    """How a stand-in behaves.

    Args:
        step_seconds: from one step to the next.
        max_running: requests that get a token in a step.
        num_blocks: KV blocks that it pretends to have.
        block_size: tokens of one.
        max_length: tokens of prompt plus answer.
        vocab_size: token ids are below this.
        stop_ids: ends of text; it never says one.
        load_seconds: how long it takes to come up.
        poison: a prompt that has this token makes the step fail that runs it.
        record: folder for a file ``emitted-<i>.json``, of times by the prompt's token ids; empty: none is written.
    """

    step_seconds: float = 0.005
    max_running: int = 1024
    num_blocks: int = 1 << 20
    block_size: int = 16
    max_length: int = 8192
    vocab_size: int = 261
    stop_ids: tuple[int, ...] = (2,)
    load_seconds: float = 0.0
    poison: int | None = None
    record: str = ""


def answer(prompt_ids: list[int], position: int) -> int:
    """The token at a position (from 0) of the answer to a prompt."""
    return _letter(sum(prompt_ids), position)


def _letter(prompt_sum: int, position: int) -> int:
    return _LETTERS[(prompt_sum + 7 * position) % len(_LETTERS)]


@dataclass
class _Running:
    request: EngineRequest
    blocks: int
    length: int = 0
    sum: int = field(init=False)
    emitted: list[float] | None = None

    def __post_init__(self) -> None:
        self.sum = sum(self.request.prompt_ids)


class StandIn:
    """The engine's methods without an engine."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.max_length, self.vocab_size, self.stop_ids = options.max_length, options.vocab_size, options.stop_ids
        self._waiting: dict[int, _Running] = {}
        self._running: dict[int, _Running] = {}
        self._free = options.num_blocks
        self._next_step = 0.0
        self.emitted: dict[str, list[float]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add_request(self, request: EngineRequest) -> None:
        tokens = len(request.prompt_ids) + request.max_new_tokens
        blocks = -(-tokens // self.options.block_size)
        if blocks > self.options.num_blocks:
            raise PromptTooLongError(f"{tokens} tokens need {blocks} blocks and there are {self.options.num_blocks}")
        if request.uid in self._waiting or request.uid in self._running:
            raise RuntimeError(f"request {request.uid} is here already")
        self._waiting[request.uid] = _Running(request, blocks)

    def step(self) -> StepOutput:
        self._admit()
        poison = self.options.poison
        if poison is not None and any(poison in running.request.prompt_ids for running in self._running.values()):
            raise FloatingPointError("the numbers of a request are not finite")
        self._pause()
        return StepOutput.of(self._advance(running) for running in list(self._running.values()))

    def abort(self, uid: int) -> None:
        self._waiting.pop(uid, None)
        running = self._running.pop(uid, None)
        if running is not None:
            self._free += running.blocks

    def stats(self) -> Any:
        return SimpleNamespace(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._free,
            num_blocks=self.options.num_blocks,
            preemptions=0,
            prefix_hit_tokens=0,
            prefix_queried_tokens=0,
        )

    def destroy(self) -> None:
        """There is nothing to give back."""

    def _admit(self) -> None:
        for uid, waiting in list(self._waiting.items()):
            if len(self._running) >= self.options.max_running or waiting.blocks > self._free:
                return
            del self._waiting[uid]
            self._running[uid] = waiting
            if self.options.record:
                key = " ".join(map(str, waiting.request.prompt_ids))
                waiting.emitted = self.emitted.setdefault(key, [])
            self._free -= waiting.blocks

    def _pause(self) -> None:
        """Sleeps until the next step is over; steps that are late are made up for, unless they are very late."""
        now = time.monotonic()
        if self._next_step < now - _LATEST_SECONDS:
            self._next_step = now
        self._next_step += self.options.step_seconds
        time.sleep(max(0.0, self._next_step - now))

    def _advance(self, running: _Running) -> TokenOutput:
        request = running.request
        token = _letter(running.sum, running.length)
        running.length += 1
        if running.emitted is not None:
            running.emitted.append(time.monotonic())
        reason = "length" if running.length >= request.max_new_tokens else None
        if reason is not None:
            self.abort(request.uid)
        return TokenOutput(request.uid, [token], reason)


def main() -> None:
    """Comes up like an engine process, and serves until a stop is requested."""
    with Process.from_arguments() as process:
        file = process.folder.path / f"standin-{process.replica}.json"
        options = msgspec.json.decode(file.read_bytes(), type=Options) if file.exists() else Options()
        process.report("pretending to load", 0.0, 1.0)
        time.sleep(options.load_seconds)
        engine = StandIn(options)
        info = EngineInfo(
            max_length=options.max_length,
            vocab_size=options.vocab_size,
            stop_ids=options.stop_ids,
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            pid=os.getpid(),
        )
        with EngineServer(engine, info, process) as server:
            settle()  # as the real one does
            process.ready()
            server.serve()
        if options.record:
            # Soon: a process that takes long to end is killed.
            Path(options.record, f"emitted-{process.replica}.json").write_bytes(msgspec.json.encode(engine.emitted))


if __name__ == "__main__":
    main()
