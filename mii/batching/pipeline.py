"""`MIIPipeline`: prompts in, answers out, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from mii.batching.base import AnswerParts, PipelineBase, stream_pieces
from mii.batching.data_classes import Response, StreamedResponse
from mii.batching.driver import Failure, Inbox
from mii.batching.intake import PreparedRequest, name_prompt
from mii.batching.tracker import RequestTracker, TextEvent
from mii.errors import GenerationError, RequestError
from mii.progress import progress_bar

# Calls with more prompts than this show a progress bar.
HANDFUL = 4


class Turn(NamedTuple):
    """What one step gave a call: tokens, and what is told of them."""

    tokens: int
    events: list[TextEvent]


class MIIPipeline(PipelineBase):
    """Generates text for prompts. Made by `mii.pipeline`.

    Calls of several threads share batches. When a call ends early, by Ctrl-C, an error or a stream that is closed, its
    requests are aborted at once and the pipeline stays usable.

    Example:
        >>> import mii
        >>> pipe = mii.pipeline("path-or-id")  # doctest: +SKIP
        >>> pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=128)  # doctest: +SKIP
    """

    def __call__(
        self,
        prompts: Any,
        streaming_fn: Callable[[list[Response]], Any] | None = None,
        *,
        progress: bool | None = None,
        **generate_kwargs: Any,
    ) -> list[Response]:
        """The answers to `prompts`, in their order.

        Args:
            prompts: A string, a list of strings, a list of token ids, or a list of such lists; arrays count as lists.
            streaming_fn: Called with a list of one `StreamedResponse` as tokens come: the new text and the count of
                tokens so far, then once with no text and the finish reason. Its `index` is the prompt's place.
            progress: Show a progress bar. None: as the model's config says, for more than a handful of prompts.
            **generate_kwargs: Options of `GenerateParamsConfig`, for every prompt of the call.

        Raises:
            pydantic.ValidationError: An option is unknown, of the wrong type or out of range.
            RequestError: A prompt is refused. Nothing was run.
            GenerationError: The engine gave up on a request; its `responses` has the answers to the other prompts.
            PipelineDestroyedError: The pipeline was destroyed.
        """
        prepared = self._read(prompts, generate_kwargs)
        if not self._shown:
            return []
        answers, streams = _Answers(prepared), streaming_fn is not None
        with self._bar(len(prepared), progress, streams) as bar, closing(self._run(prepared, not streams)) as turns:
            for turn in turns:
                bar.update(answers.add(turn))
                if not bar.disable:
                    bar.set_postfix_str(answers.speed(), refresh=False)
                if streaming_fn is not None:
                    for piece in answers.pieces(turn):
                        streaming_fn([piece])
        return answers.responses()

    def stream(self, prompts: Any, **generate_kwargs: Any) -> Iterator[list[StreamedResponse]]:
        """The answers as they come: for each step a list of the pieces of text that it gave.

        A piece says with `index` whose it is. Each answer ends with a piece that has no text and the finish reason.
        Prompts and options are checked now; generation begins with the first step that is asked for and stops when the
        iterator is closed.

        Args:
            prompts: As for a call.
            **generate_kwargs: As for a call; `return_full_text` has no effect.

        Raises:
            Exception: As a call does; `GenerationError` when all other answers have ended.

        Example:
            >>> for pieces in pipe.stream("DeepSpeed is"):  # doctest: +SKIP
            ...     print("".join(piece.generated_text for piece in pieces), end="", flush=True)
        """
        return self._stream(self._read(prompts, generate_kwargs))

    def _stream(self, prepared: list[PreparedRequest]) -> Iterator[list[StreamedResponse]]:
        if not self._shown:
            return
        answers = _Answers(prepared)
        with closing(self._run(prepared)) as turns:
            for turn in turns:
                answers.add(turn)
                if turn.events:
                    yield answers.pieces(turn)
        answers.responses()

    @property
    def _shown(self) -> bool:
        """Whether this process gets answers. One that does not computes its part of them in the background."""
        return self.is_rank_0 or self.all_rank_output

    def _read(self, prompts: Any, options: dict[str, Any]) -> list[PreparedRequest]:
        self._driver.check_usable()
        if options.pop("stream", False):
            raise RequestError("stream=True is no option here; use pipe.stream(prompts), or give streaming_fn=")
        return self._intake.read(prompts, options)

    def _run(self, prepared: list[PreparedRequest], whole: bool = False) -> Generator[Turn, None, None]:
        """Steps the engine until all requests have ended. Closing it aborts those that have not.

        Args:
            prepared: The requests.
            whole: Whether texts are wanted when they are complete, and not as they come.
        """
        tracker, inbox = RequestTracker(self._decoder), Inbox()
        by_uid = {each.request.uid: each for each in prepared}
        for each in prepared:
            tracker.add(
                each.request,
                each.stops,
                skip_special_tokens=each.skip_special_tokens,
                context=each.context,
                whole=whole,
            )
        try:
            if prepared:
                self._driver.submit([each.request for each in prepared], inbox)
            while len(tracker):
                for delivery in self._driver.take(inbox):
                    if isinstance(delivery, Failure):
                        raise _blame(delivery, by_uid)
                    events = tracker.take(delivery)
                    ended = [event.uid for event in events if event.abort]
                    if ended:
                        self._driver.abort(ended)
                    yield Turn(len(delivery), events)
        finally:
            self._driver.abort(by_uid)

    def _bar(self, prompts: int, progress: bool | None, streams: bool) -> Any:
        if progress is None:
            progress = self.model_config.progress if prompts > HANDFUL and not streams else False
        return progress_bar("prompts", prompts, unit="prompt", enabled=progress)


class _Answers:
    """The texts of a call in the making."""

    def __init__(self, prepared: list[PreparedRequest]) -> None:
        self._prepared = {each.request.uid: each for each in prepared}
        self._parts = {each.request.uid: AnswerParts(each) for each in prepared}
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, turn: Turn) -> int:
        """Takes in what a step gave; how many answers ended with it."""
        self._tokens += turn.tokens
        for event in turn.events:
            self._parts[event.uid].add(event)
        return sum(event.finished for event in turn.events)

    def pieces(self, turn: Turn) -> list[StreamedResponse]:
        """The same as it is streamed."""
        return [piece for event in turn.events for piece in stream_pieces(self._prepared[event.uid], event)]

    def speed(self) -> str:
        return f"{self._tokens / (time.perf_counter() - self._start):.0f} tokens/s"

    def responses(self) -> list[Response]:
        """All answers.

        Raises:
            GenerationError: Some have none, because the engine gave up on them.
        """
        results = [parts.response() for parts in self._parts.values()]
        last = [parts.last for parts in self._parts.values()]
        errors = {index: event.error for index, event in enumerate(last) if event is not None and event.error}
        if errors:
            index, reason = next(iter(errors.items()))
            others = f" (and {len(errors) - 1} more prompts failed)" if len(errors) > 1 else ""
            error = GenerationError(f"prompt {index} of {len(results)} (counted from 0): {reason}{others}")
            error.responses = results
            raise error
        return [result for result in results if result is not None]


def _blame(failure: Failure, by_uid: dict[int, PreparedRequest]) -> Exception:
    """The error of a failure; where one of several prompts was refused, the message says which."""
    if failure.refused is None or len(by_uid) == 1:
        return failure.error
    return name_prompt(failure.error, by_uid[failure.refused].index, len(by_uid))
