"""Text in, text out, over an engine in another process: what the calls of a replica's front share.

Prompts are checked and tokenised here, tokens become text here, and each call gets what its own prompts say. What the
reader of a call has not taken yet is one merged piece for each prompt, however slow the reader is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from mii import errors
from mii.backend.engine_client import EngineClient
from mii.backend.messages import EngineInfo, Refused
from mii.batching.data_classes import StepOutput, TokenOutput
from mii.batching.generation.detokenizer import TokenDecoder
from mii.batching.intake import Intake, PreparedRequest, name_prompt
from mii.batching.tracker import RequestTracker, TextEvent
from mii.errors import GenerationError, RequestError, ServerBusyError, ServerUnavailableError
from mii.grpc_related.conversations import CHAT, fill_templates
from mii.grpc_related.generation import Generation
from mii.grpc_related.pacer import MESSAGES_A_SECOND, MESSAGES_AT_ONCE, Pacer
from mii.grpc_related.replica_metrics import ReplicaMetrics
from mii.logging import logger

__all__ = ["TextSession"]

# Prompts of more characters (or token ids) in all are tokenised beside the event loop, which they would hold up.
_INLINE_CHARACTERS = 8192
_RETRY_SECONDS = (0.1, 30.0)


class TextSession:
    """The calls of one replica. Made within a running event loop.

    Args:
        tokenizer: mii's tokenizer wrapper.
        address: ``ipc://`` address where the engine listens, or will.
        max_length: the config's limit for prompt plus answer, in tokens; None: the engine's.
        seed: see `Intake`.
        queue_size: prompts that are taken at once, running or waiting; more are refused.
        silence_seconds: see `EngineClient`.
    """

    def __init__(
        self,
        tokenizer: Any,
        address: str,
        *,
        max_length: int | None = None,
        seed: int | None = None,
        queue_size: int,
        silence_seconds: float,
    ) -> None:
        self._tokenizer, self._max_length, self._seed = tokenizer, max_length, seed
        self._queue_size = queue_size
        self._intake: Intake | None = None
        self._tracker = RequestTracker(TokenDecoder(tokenizer))
        self._generations: dict[int, Generation] = {}
        self._admitted = 0
        self._ready = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        self._pacer = Pacer(MESSAGES_A_SECOND, MESSAGES_AT_ONCE)
        self.metrics = ReplicaMetrics()
        self.engine = EngineClient(address, self, silence_seconds=silence_seconds)
        self.on_state: Callable[[bool], None] = lambda ready: None
        """Told whether there is an engine, when that changes."""

    def start(self) -> None:
        """Begins to connect to the engine."""
        self.engine.start()

    async def close(self) -> None:
        """Ends everything that still runs, and lets go of the engine."""
        self.fail_all(ServerUnavailableError("the server is shutting down"))
        await self.engine.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def wait_ready(self) -> EngineInfo:
        """Sleeps until there is an engine."""
        while self.engine.info is None:
            self._ready.clear()
            await self._ready.wait()
        return self.engine.info

    @property
    def outstanding(self) -> int:
        """Prompts that were taken and whose answers have not ended."""
        return self._admitted

    def numbers(self) -> dict[str, Any]:
        """What the replica counts, as JSON types: its own counts and the engine's."""
        return {
            "outstanding": self._admitted,
            "queue_size": self._queue_size,
            "engine": {**msgspec.structs.asdict(self.engine.stats), "lives": self.engine.lives},
            **self.metrics.numbers(),
        }

    # Calls

    async def open(
        self,
        prompts: Sequence[Any],
        options: Mapping[str, Any],
        *,
        places: Sequence[int] | None = None,
        streams: bool,
        tell: Callable[[], object] | None = None,
    ) -> Generation:
        """Takes a call's prompts, all or none, and begins to generate. Whoever opens must `close_call`.

        Args:
            prompts: texts, or lists of token ids.
            options: see `GenerateParamsConfig`.
            places: for each prompt the number that its pieces have; None: counted from 0.
            streams: whether pieces are wanted as they come (`Generation.take`), or all at the end (`Generation.all`).
            tell: called when there are pieces to `Generation.collect`; in place of `streams`.

        Raises:
            pydantic.ValidationError: an option is unknown, of the wrong type or out of range.
            RequestError: a prompt is refused.
            ServerBusyError: the queue is full.
            ServerUnavailableError: there is no engine now.
        """
        self._admit(len(prompts))
        try:
            started = time.monotonic()
            prepared = await self._read(prompts, options, places)
            pacer = self._pacer if streams else None
            return self._begin(prepared, Generation(prepared, started, places, pacer, tell))
        except BaseException:
            self._admitted -= len(prompts)
            raise

    def close_call(self, generation: Generation, reason: str = "cancelled") -> None:
        """Ends what of a call still runs, and frees all it holds. A call that has ended is fine.

        Args:
            generation: the call.
            reason: for the metrics.
        """
        uids, now = generation.open, time.monotonic()
        self.engine.abort(uids)
        for uid in uids:
            self._tracker.discard(uid)
            self._end(uid, reason, now)
        generation.drop()

    def fail_call(self, generation: Generation, error: Exception) -> None:
        """Ends a call with an error, and frees all it holds."""
        self.close_call(generation, "error")
        generation.fail(error)

    def _admit(self, count: int) -> None:
        """A call that is larger than the whole queue is taken when nothing else is there."""
        if self._intake is None or self.engine.info is None:
            raise ServerUnavailableError(f"this replica has no engine now ({self.engine.reason}); try again soon")
        if self._admitted and self._admitted + count > self._queue_size:
            raise self._busy(count)
        self._admitted += count

    def _busy(self, count: int) -> ServerBusyError:
        speed = self.metrics.ends_a_second(time.monotonic())
        shortest, longest = _RETRY_SECONDS
        error = ServerBusyError(
            f"the queue is full: {self._admitted} prompts are running or waiting, {self._queue_size} may (queue_size), "
            f"and this call has {count}; try again later"
        )
        error.retry_after = min(max(count / speed, shortest), longest) if speed else 1.0
        return error

    async def _read(
        self, prompts: Sequence[Any], options: Mapping[str, Any], places: Sequence[int] | None
    ) -> list[PreparedRequest]:
        assert self._intake is not None
        if CHAT not in options and sum(map(len, prompts)) <= _INLINE_CHARACTERS:
            return self._intake.read(prompts, options, places)
        loop = asyncio.get_running_loop()
        read = partial(self._read_beside, self._intake, prompts, dict(options), places)
        return await loop.run_in_executor(self._executor, read)

    def _read_beside(
        self, intake: Intake, prompts: Sequence[Any], options: dict[str, Any], places: Sequence[int] | None
    ) -> list[PreparedRequest]:
        """What takes a while: long prompts, and chat templates, the first of which loads the library for them."""
        chat = options.pop(CHAT, None)
        return intake.read(prompts if chat is None else fill_templates(self._tokenizer, prompts, chat), options, places)

    def _begin(self, prepared: Sequence[PreparedRequest], generation: Generation) -> Generation:
        try:
            for each in prepared:
                self._tracker.add(
                    each.request, each.stops, skip_special_tokens=each.skip_special_tokens, context=each.context
                )
            self.engine.add([each.request for each in prepared])
        except BaseException:
            for each in prepared:
                self._tracker.discard(each.request.uid)
            raise
        for each in prepared:
            self._generations[each.request.uid] = generation
            self.metrics.prompt_tokens += each.prompt_length
        return generation

    # What the engine says

    def on_ready(self, info: EngineInfo) -> None:
        logger.info("the engine is there: %s", info)
        if self._intake is None:  # it gives uids, which must not come again with the next engine
            limit = info.max_length if self._max_length is None else min(self._max_length, info.max_length)
            self._intake = Intake(
                self._tokenizer,
                max_length=limit,
                vocab_size=info.vocab_size,
                stop_ids=info.stop_ids,
                seed=self._seed,
            )
        self._ready.set()
        self.on_state(True)

    def on_outputs(self, outputs: StepOutput) -> None:
        now, push = time.monotonic(), self._tracker.push
        for uid, token_id in zip(outputs.uids, outputs.token_ids, strict=True):
            try:
                event = push(uid, token_id)
            except Exception as error:
                event = self._without_text(TokenOutput(uid, [token_id]), error)
            if event is not None:
                self._pass_on(event, now)
        for output in outputs.others:
            try:
                event = self._tracker.update(output)
            except Exception as error:
                event = self._without_text(output, error)
            if event is not None:
                self._pass_on(event, now)

    def _pass_on(self, event: TextEvent, now: float) -> None:
        self.metrics.generated_tokens += event.new_tokens
        ended = self._generations[event.uid].push(event, now)
        if event.abort:
            self.engine.abort([event.uid])
        if ended:
            self._end(event.uid, event.finish_reason if event.error is None else "error", now)

    def on_refused(self, refused: Refused) -> None:
        generation = self._generations.get(refused.uid)
        if generation is None:
            return
        kind = getattr(errors, refused.kind, GenerationError)
        error: Exception = kind(refused.error) if issubclass(kind, RequestError) else GenerationError(refused.error)
        if len(generation) > 1:
            error = name_prompt(error, generation.index(refused.uid), len(generation))
        self.close_call(generation, "refused")
        generation.fail(error)

    def on_lost(self, reason: str) -> None:
        self.metrics.engine_losses += 1
        self.on_state(False)
        self.fail_all(ServerUnavailableError(f"the engine that ran this request is lost: {reason}"))

    def _without_text(self, output: TokenOutput, error: Exception) -> TextEvent:
        """A tokenizer that fails at new tokens ends their request alone."""
        logger.error("the tokens %s of request %d have no text", output.token_ids, output.uid, exc_info=error)
        self._tracker.discard(output.uid)
        reason = f"the tokenizer failed at the answer's tokens: {type(error).__name__}: {error}"
        return TextEvent(output.uid, "", 0, 0, error=reason, abort=output.finish_reason is None)

    def fail_all(self, error: Exception) -> None:
        """Ends every call with an error, at once."""
        for generation in set(self._generations.values()):
            self.fail_call(generation, error)

    def _end(self, uid: int, reason: str, now: float) -> None:
        generation = self._generations.pop(uid)
        self.metrics.end(generation.timing(uid), generation.length(uid), str(reason), now)
        self._admitted -= 1
