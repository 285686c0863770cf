"""From an engine's tokens to text: for each request its detokenizer, its stop strings and its lengths.

Plain data and plain calls, no thread and no clock, so that a pipeline, a server's event loop and a test use it alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mii.batching.data_classes import EngineRequest, GenerationFinishReason, StepOutput, TokenLogprob, TokenOutput
from mii.batching.generation.detokenizer import Detokenizer, TokenDecoder
from mii.batching.generation.stops import StopMatcher, StopStrings


class TextEvent(msgspec.Struct, frozen=True, gc=False):
    """What a request's new tokens come to.

    Args:
        uid: The request.
        text: Its new text, "" while a character or a possible stop string is incomplete.
        new_tokens: Tokens that this event is about.
        generated_length: Tokens of the answer so far, the one that ended it included.
        finish_reason: NONE while it runs. After any other, no event of this request follows.
        error: What went wrong, when the request ended with an error.
        abort: The text ended, and the engine, which knows nothing of stop strings, must be told to abort.
        logprobs: An entry for each of the new tokens, with its bytes; None where the request asks for none.
        prompt_logprobs: An entry for each token of the prompt, in the request's first event, if it asks for them.
    """

    uid: int
    text: str
    new_tokens: int
    generated_length: int
    finish_reason: GenerationFinishReason = GenerationFinishReason.NONE
    error: str | None = None
    abort: bool = False
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last event."""
        return self.error is not None or self.finish_reason is not GenerationFinishReason.NONE


class _Answer:
    """One request's text in the making."""

    __slots__ = ("detokenizer", "length", "min_new_tokens", "push", "stop_ids", "stops", "told", "untold", "whole")

    def __init__(self, request: EngineRequest, stops: StopStrings, detokenizer: Detokenizer, whole: bool) -> None:
        self.detokenizer = detokenizer
        self.stops = StopMatcher(stops)
        self.stop_ids = frozenset(request.stop_ids)
        self.min_new_tokens = request.min_new_tokens
        self.whole = whole
        self.length = 0
        self.told = 0  # tokens that events were about
        self.untold: list[str] = []  # the text of those since
        # The text of a token that was counted, as far as it can be no part of a stop string.
        self.push = self._push if self.stops.looks else detokenizer.push

    def _push(self, token_id: int) -> str:
        armed = self.length > self.min_new_tokens
        piece = self.detokenizer.push(token_id)
        text = self.stops.feed(piece, armed) if piece else ""
        if armed and self.detokenizer.draft:
            return text + (self.stops.look_ahead(self.detokenizer.draft) or "")
        return text

    def more(self, uid: int, text: str) -> TextEvent | None:
        """Tells of text that does not end the answer, or keeps it for the end."""
        if not self.whole:
            return self.event(uid, text)
        self.untold.append(text)
        return None

    def end(self) -> str:
        """What is left when no token follows."""
        text = self.stops.feed(self.detokenizer.flush(), self.length > self.min_new_tokens)
        return text + self.stops.flush()

    def event(
        self,
        uid: int,
        text: str,
        reason: GenerationFinishReason = GenerationFinishReason.NONE,
        error: str | None = None,
        abort: bool = False,
    ) -> TextEvent:
        """Tells of all tokens that were not told of yet; `text`: what the last ones add to their text."""
        if self.untold:
            text, self.untold = "".join((*self.untold, text)), []
        new, self.told = self.length - self.told, self.length
        return TextEvent(uid, text, new, self.length, reason, error, abort)


class RequestTracker:
    """Turns `TokenOutput`s into `TextEvent`s.

    Args:
        decoder: The tokenizer's decoder.

    A caller adds a request when the engine gets it, passes every output to `update`, and tells the engine to abort
    where an event says so. What comes after a request's end is ignored, so an engine may run some steps ahead.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._answers: dict[int, _Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, uid: int) -> bool:
        return uid in self._answers

    @property
    def uids(self) -> list[int]:
        """The requests that have not ended, oldest first."""
        return list(self._answers)

    def add(
        self,
        request: EngineRequest,
        stops: StopStrings,
        *,
        skip_special_tokens: bool = False,
        context: Sequence[int] = (),
        whole: bool = False,
    ) -> None:
        """Expects tokens of a request.

        Args:
            request: What the engine gets.
            stops: Strings that end its text.
            skip_special_tokens: Whether special tokens are left out of the text.
            context: See `TokenDecoder.start`.
            whole: Whether nobody wants its text before it ends: then there is one event of all tokens, where the engine
                has no more to say of them.
        """
        detokenizer = self._decoder.start(skip_special_tokens=skip_special_tokens, context=context)
        self._answers[request.uid] = _Answer(request, stops, detokenizer, whole)

    def discard(self, uid: int) -> None:
        """Forgets a request; one that is not there is fine."""
        self._answers.pop(uid, None)

    def take(self, step: StepOutput) -> list[TextEvent]:
        """The text of a step's tokens, of requests that have not ended and were added here."""
        events = [self.push(uid, token_id) for uid, token_id in zip(step.uids, step.token_ids, strict=True)]
        return [event for event in (*events, *map(self.update, step.others)) if event is not None]

    def push(self, uid: int, token_id: int) -> TextEvent | None:
        """As `update`, of a token after which the engine goes on: those of most steps."""
        answer = self._answers.get(uid)
        if answer is None:
            return None
        answer.length += 1
        text = answer.push(token_id)
        if answer.stops.matched is not None:
            self.discard(uid)
            return answer.event(uid, text, GenerationFinishReason.STOP, abort=True)
        return answer.more(uid, text)

    def update(self, output: TokenOutput) -> TextEvent | None:
        """The text of new tokens; None if it is kept, or the request has ended or was never added."""
        answer = self._answers.get(output.uid)
        if answer is None:
            return None
        scored = output.logprobs is not None or output.prompt_logprobs is not None
        if output.finish_reason is None and not scored and len(output.token_ids) == 1:
            return self.push(output.uid, output.token_ids[0])
        event = _event(answer, output)
        if scored:
            event = self._with_logprobs(event, output)
        if event.finished:
            self.discard(output.uid)
        return event

    def _with_logprobs(self, event: TextEvent, output: TokenOutput) -> TextEvent:
        """The event with what the engine says of its tokens; of those after the text's end it says nothing."""
        mine = None if output.logprobs is None else output.logprobs[: event.new_tokens]
        return msgspec.structs.replace(
            event, logprobs=self._named(mine), prompt_logprobs=self._named(output.prompt_logprobs)
        )

    def _named(self, entries: Sequence[TokenLogprob] | None) -> list[TokenLogprob] | None:
        """The entries with their tokens' bytes."""
        if entries is None:
            return None
        name = self._decoder.token_bytes
        return [
            TokenLogprob(
                entry.token_id,
                entry.logprob,
                tuple(TokenLogprob(top.token_id, top.logprob, (), name(top.token_id)) for top in entry.top),
                name(entry.token_id),
            )
            for entry in entries
        ]


def _event(answer: _Answer, output: TokenOutput) -> TextEvent:
    text, shown = "", len(output.token_ids)
    if output.finish_reason == "stop" and shown and output.token_ids[-1] in answer.stop_ids:
        shown -= 1  # the end-of-text token is counted and not shown
    for token_id in output.token_ids[:shown]:
        answer.length += 1
        text += answer.push(token_id)
        if answer.stops.matched is not None:
            return _ended_by_stop_string(answer, output, text)
    if output.finish_reason is None:
        return answer.event(output.uid, text)
    text += answer.end()
    if answer.stops.matched is not None:
        return _ended_by_stop_string(answer, output, text)
    answer.length += len(output.token_ids) - shown
    if output.finish_reason == "error":
        return answer.event(output.uid, text, error=output.error or "the engine gave no reason")
    return answer.event(output.uid, text, GenerationFinishReason(output.finish_reason))


def _ended_by_stop_string(answer: _Answer, output: TokenOutput, text: str) -> TextEvent:
    return answer.event(output.uid, text, GenerationFinishReason.STOP, abort=output.finish_reason is None)
