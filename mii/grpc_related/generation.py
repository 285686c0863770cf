"""One call's answers as they come: pieces for a reader who streams, or all at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from mii.batching.data_classes import GenerationFinishReason, TokenLogprob
from mii.batching.intake import PreparedRequest
from mii.batching.tracker import TextEvent
from mii.grpc_related.pacer import Pacer

__all__ = ["Generation", "Piece", "Timing"]

_RUNS = GenerationFinishReason.NONE


class Piece(msgspec.Struct, frozen=True):
    """What is new of one prompt's answer.

    Args:
        index: the prompt's place in the call that the client made.
        text: the text that is new since the last piece.
        prompt_length: tokens of the prompt.
        generated_length: tokens of the answer so far.
        model_seconds: from the answer's first token to the last one so far.
        finish_reason: NONE while the answer runs.
        error: why the answer ended without being complete, if it did.
        logprobs: of the tokens that are new since the last piece, where the call asks for them.
        prompt_logprobs: of the prompt's tokens, once, where the call asks for them.
    """

    index: int
    text: str
    prompt_length: int
    generated_length: int
    model_seconds: float = 0.0
    finish_reason: GenerationFinishReason = GenerationFinishReason.NONE
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Timing(msgspec.Struct):
    """When an answer's tokens came, by `time.monotonic`; 0.0: not yet."""

    started: float
    first: float = 0.0
    last: float = 0.0


class _Answer:
    """One prompt's answer: what the reader has not taken yet, and where it stands."""

    __slots__ = (
        "ended",
        "error",
        "fresh",
        "length",
        "logprobs",
        "place",
        "prepared",
        "prompt_length",
        "prompt_logprobs",
        "reason",
        "shown",
        "texts",
        "timing",
    )

    def __init__(self, prepared: PreparedRequest, place: int, now: float) -> None:
        self.prepared, self.place = prepared, place
        self.prompt_length = prepared.prompt_length
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] | None = None
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.length = 0
        self.shown = 0
        self.fresh = False
        self.ended = False
        self.reason = GenerationFinishReason.NONE
        self.error: str | None = None
        self.timing = Timing(now)

    def push(self, event: TextEvent, now: float) -> None:
        if event.text:
            self.texts.append(event.text)
        if event.new_tokens:
            timing = self.timing
            self.length = event.generated_length
            timing.first = timing.first or now
            timing.last = now
        if event.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(event.logprobs)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        if event.finished:
            self.ended, self.reason, self.error = True, event.finish_reason, event.error

    def piece(self, reason: GenerationFinishReason, error: str | None = None) -> Piece:
        """All that is new, and it is new no longer."""
        text, self.texts = "".join(self.texts), []
        logprobs, self.logprobs = self.logprobs, None
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        seconds = self.timing.last - self.timing.first
        length = self.shown = self.length
        return Piece(self.place, text, self.prompt_length, length, seconds, reason, error, logprobs, prompt_logprobs)

    def whole(self) -> Piece:
        """The answer in full, with the prompt's text where it is wanted."""
        self.texts.insert(0, self.prepared.text or "")
        return self.piece(self.reason, self.error)


class Generation:
    """The answers to one call's prompts.

    Args:
        prepared: the prompts.
        now: the time.
        places: for each prompt the number that its pieces have; None: counted from 0.
        pacer: gives a stream its turn to send; None: the answers are wanted when all have ended.
        tell: in place of a pacer, called when there is something to `collect`.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedRequest],
        now: float,
        places: Sequence[int] | None,
        pacer: Pacer | None,
        tell: Callable[[], object] | None = None,
    ) -> None:
        places = range(len(prepared)) if places is None else places
        self._answers = {
            each.request.uid: _Answer(each, place, now) for each, place in zip(prepared, places, strict=True)
        }
        self._open = set(self._answers)
        self._fresh: list[_Answer] = []
        self._pacer, self._tell = pacer, tell
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._asked = False

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def open(self) -> list[int]:
        """The uids whose answers have not ended."""
        return list(self._open)

    def index(self, uid: int) -> int:
        """The place of a request's prompt in the call."""
        return self._answers[uid].prepared.index

    def timing(self, uid: int) -> Timing:
        """When a request's tokens came."""
        return self._answers[uid].timing

    def length(self, uid: int) -> int:
        """Tokens of a request's answer so far."""
        return self._answers[uid].length

    def push(self, event: TextEvent, now: float) -> bool:
        """Takes in what is new of an answer. Returns whether that was its end."""
        answer = self._answers[event.uid]
        answer.push(event, now)
        ended = answer.ended
        if ended:
            self._open.discard(event.uid)
        if self._pacer is None and self._tell is None:
            if not self._open:
                self._wake()
        elif not answer.fresh and (event.new_tokens or event.text or ended):
            answer.fresh = True
            self._fresh.append(answer)
            self._ask()
        return ended

    def drop(self) -> None:
        """No more comes of what has not ended."""
        self._open.clear()

    def fail(self, error: Exception) -> None:
        """Ends the call; its reader gets `error` at once."""
        self.drop()
        self._failure = error
        if self._tell is not None:
            self._tell()
        self._wake()

    async def all(self) -> list[Piece]:
        """Every answer in full, in the order of the prompts, once all have ended.

        Raises:
            Exception: what `fail` was given.
        """
        while self._open and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        return [answer.whole() for answer in self._answers.values()]

    async def take(self) -> tuple[list[Piece], list[Piece]]:
        """What is new, once something is and it is this stream's turn.

        Returns:
            The pieces of text, and of the answers that have ended a last piece each, without text. Both are empty once
            everything was taken.

        Raises:
            Exception: what `fail` was given, before anything that was not taken.
        """
        while self._failure is None and (self._fresh or self._open):
            await self._wait()
            if self._fresh:
                break
        return self.collect()

    @property
    def ended(self) -> bool:
        """Whether everything was taken."""
        return not self._open and not self._fresh

    def collect_running(self) -> Piece | None:
        """What is new, where that is text of one answer, which goes on: most of what ever comes. None: it is something
        else, and `collect` has it.
        """
        if len(self._fresh) != 1 or self._failure is not None:
            return None
        (answer,) = self._fresh
        if answer.ended or answer.logprobs is not None or answer.prompt_logprobs is not None:
            return None
        self._fresh.clear()
        answer.fresh = False
        return answer.piece(_RUNS)

    def collect(self) -> tuple[list[Piece], list[Piece]]:
        """What is new now, as `take` has it; may be nothing.

        Raises:
            Exception: see `take`.
        """
        if self._failure is not None:
            raise self._failure
        fresh, self._fresh = self._fresh, []
        pieces, last = [], []
        for answer in fresh:
            answer.fresh = False
            if answer.texts or answer.length > answer.shown:
                pieces.append(answer.piece(_RUNS))
            if answer.ended:
                last.append(answer.piece(answer.reason, answer.error))
        return pieces, last

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        if self._fresh:
            self._ask()
        try:
            await self._reader
        finally:
            self._reader = None

    def _ask(self) -> None:
        """Asks for a turn to send, unless the reader is busy sending or has asked already."""
        if self._tell is not None:
            self._tell()
        elif self._pacer is not None and self._reader is not None and not self._asked:
            self._asked = True
            self._pacer.ask(self._turn)

    def _turn(self) -> None:
        self._asked = False
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
