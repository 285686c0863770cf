"""From what a user gives (prompts and options) to what an engine takes; all of it is checked before any of it runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mii.batching.data_classes import EngineRequest
from mii.batching.generation.params import GenerateParamsConfig
from mii.batching.generation.stops import StopStrings
from mii.errors import EmptyPromptError, PromptEncodingError, PromptTypeError, RequestError

_ALLOWED = "a string, a list of strings, a list of token ids, or a list of such lists"


@dataclass(frozen=True)
class PreparedRequest:
    """One prompt, ready for the engine.

    Args:
        request: What the engine takes.
        index: The prompt's place in the call.
        text: The prompt's text, where the answer shall be given with it.
        stops: Strings that end the answer's text.
        skip_special_tokens: Special tokens are left out of the answer's text.
    """

    request: EngineRequest
    index: int
    text: str | None
    stops: StopStrings
    skip_special_tokens: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, special tokens included."""
        return len(self.request.prompt_ids)

    @property
    def context(self) -> Sequence[int]:
        """What the answer's text continues: the prompt's tokens, where its text is given too."""
        return self.request.prompt_ids if self.text else ()


@dataclass(frozen=True)
class _Call:
    """What the prompts of a call share. Equal prompts differ, because each draws with the call's seed and its place."""

    params: GenerateParamsConfig
    stops: StopStrings
    seed: int
    stop_ids: Sequence[int]
    begin_id: int | None


class Intake:
    """Reads the prompts and options of calls.

    Args:
        tokenizer: mii's tokenizer wrapper, or an object with the same `encode` and `decode`.
        max_length: Tokens of prompt and answer at most.
        vocab_size: Token ids are below this.
        stop_ids: The model's end-of-text tokens; the tokenizer's own, as it is at the time of a call, is added.
        seed: Makes the random numbers of all calls without a seed repeatable as a whole; None: new at each start.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, vocab_size: int, stop_ids: Iterable[int], seed: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._call_seeds = random.Random(seed)
        self._uids = itertools.count(1)

    def read(
        self, prompts: Any, options: Mapping[str, Any], places: Sequence[int] | None = None
    ) -> list[PreparedRequest]:
        """The requests of one call, in the order of its prompts.

        Args:
            prompts: A string, a list of strings, a list of token ids or a list of such lists; arrays count as lists.
            options: Generation options by name, see `GenerateParamsConfig`.
            places: Where these prompts are a part of a call, the place of each in that; None: they are all of it.

        Raises:
            pydantic.ValidationError: An option is unknown, of the wrong type or out of range.
            RequestError: A prompt is of the wrong type, cannot be encoded, is empty or is too long. The message says
                which of several.
        """
        call = self._begin_call(options)
        given = prompt_list(prompts)
        whole = places is None or list(places) == list(range(len(given)))
        names = [_Name(place, len(given) if whole else None) for place in places or range(len(given))]
        read = []
        for prompt, ids, name in zip(given, self._all_ids(given, names), names, strict=True):
            with name.in_errors():
                read.append(self._prepare(prompt, ids, name.place, call))
        return read

    def _begin_call(self, options: Mapping[str, Any]) -> _Call:
        params = GenerateParamsConfig(**{name: value for name, value in options.items() if name != "prompt_length"})
        seed = self._call_seeds.getrandbits(63) if params.seed is None else params.seed
        own_end = getattr(self._tokenizer, "eos_token_id", None)
        ends = self._stop_ids if own_end is None or own_end in self._stop_ids else (*self._stop_ids, int(own_end))
        return _Call(
            params=params.model_copy(update={"seed": None}),
            stops=StopStrings(params.stop),
            seed=seed,
            stop_ids=ends,
            begin_id=getattr(self._tokenizer, "bos_token_id", None),
        )

    def _all_ids(self, prompts: list[Any], names: list[_Name]) -> list[list[int]]:
        """The tokens of each prompt, texts encoded together where the tokenizer can."""
        given = []
        for prompt, name in zip(prompts, names, strict=True):
            with name.in_errors():
                given.append(_checked_text(prompt) if isinstance(prompt, str) else self._checked_ids(prompt))
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        if texts and hasattr(self._tokenizer, "encode_batch"):  # faster, and other threads can run meanwhile
            encoded = iter(self._tokenizer.encode_batch(texts))
        else:
            encoded = (list(_plain(self._tokenizer.encode(text))) for text in texts)
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]

    def _prepare(self, prompt: Any, ids: list[int], index: int, call: _Call) -> PreparedRequest:
        seeds = random.Random(index << 64 | call.seed)
        request = call.params.engine_request(
            next(self._uids), ids, max_length=self._max_length, stop_ids=call.stop_ids, seeds=seeds
        )
        text = None
        if call.params.return_full_text:
            text = prompt if isinstance(prompt, str) else self._text_of(ids, call.begin_id)
        return PreparedRequest(request, index, text, call.stops, call.params.skip_special_tokens)

    def _checked_ids(self, prompt: Any) -> list[int]:
        ids = _plain(prompt)
        if not _is_list(ids):
            raise PromptTypeError(f"a prompt is {_what(prompt)}; give {_ALLOWED}")
        if not ids:
            raise EmptyPromptError("a prompt given as token ids is empty; give at least one token")
        if not _are_integers(ids):
            wrong = next(token for token in ids if not _are_integers([token]))
            raise PromptTypeError(f"a prompt's token ids hold {_what(wrong)}; give {_ALLOWED}")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._vocab_size:
                raise RequestError(
                    f"a prompt holds token id {token}, and the model's are 0 to {self._vocab_size - 1}; was it made "
                    "with another model's tokenizer?"
                )
        return [int(token) for token in ids]

    def _text_of(self, ids: list[int], begin_id: int | None) -> str:
        """The text of a prompt that came as tokens, without the beginning-of-text token that no user wrote."""
        return str(self._tokenizer.decode(ids[1:] if ids[0] == begin_id else ids))


def name_prompt(error: Exception, index: int, count: int | None) -> Exception:
    """An error about one of a call's prompts, with its place in the message; `count` None: of an unknown number."""
    of_all = "" if count is None else f" of {count}"
    return type(error)(f"prompt {index}{of_all} (counted from 0): {error}")


@dataclass(frozen=True)
class _Name:
    """What errors call a prompt: its place in the call, and of how many, where that is known."""

    place: int
    count: int | None

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Errors of the request inside say which of several prompts they are about."""
        try:
            yield
        except RequestError as error:
            if self.count == 1:
                raise
            raise name_prompt(error, self.place, self.count) from error


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptEncodingError(
            f"the prompt is not valid Unicode: {text[error.start]!r} at character {error.start} is half of a "
            "surrogate pair; decode the text from its bytes as UTF-8"
        ) from None
    return text


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts of a call: one on its own is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    given = _plain(prompts)
    if isinstance(given, Iterator):
        given = list(given)
    if not _is_list(given):
        raise PromptTypeError(f"prompts is {_what(prompts)}; give {_ALLOWED}")
    if given and _are_integers(given):
        return [given]
    wrong = next((item for item in given if not isinstance(item, str) and not _is_list(_plain(item))), None)
    if wrong is not None:
        raise PromptTypeError(f"prompts holds {_what(wrong)}; give {_ALLOWED}")
    return list(given)


def _plain(value: Any) -> Any:
    """An array or tensor as a list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _are_integers(values: Sequence[Any]) -> bool:
    """Whether all are integers, Python's or an array library's; True and False are not."""
    return all(issubclass(kind, Integral) and not issubclass(kind, bool) for kind in set(map(type, values)))


def _what(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
