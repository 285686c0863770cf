"""The options of one generation call, and what they come to for one prompt.

Example:
    >>> params = GenerateParamsConfig(max_new_tokens=100, stop="\\n\\n", seed=7)
    >>> params.resolve(prompt_length=10, max_length=64)
    54
"""

from __future__ import annotations

import operator
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from mii.batching.data_classes import MAX_LOGPROBS, EngineRequest, SamplingParams
from mii.errors import EmptyPromptError, PromptTooLongError
from mii.validation import ConfigModel, NonNegativeInt, Number, PositiveInt, Seed

__all__ = ["GenerateParamsConfig"]

# Below this, dividing logits by the temperature overflows 32-bit floats; the limit is the most likely token.
_GREEDY_BELOW = 1e-5

_NOT_DONE = "mii does not do this"
_HINTS = {
    "max_tokens": "use max_new_tokens",
    "max_completion_tokens": "use max_new_tokens",
    "min_tokens": "use min_new_tokens",
    "n": "give the prompt n times: pipe([prompt] * n)",
    "best_of": _NOT_DONE,
    "num_return_sequences": "give the prompt several times: pipe([prompt] * n)",
    "num_beams": _NOT_DONE,
    "length_penalty": _NOT_DONE,
    "top_logprobs": "use logprobs=n for a token's own log-probability and those of the n most likely ones",
    "echo": "use return_full_text=True for the prompt's text, prompt_logprobs=n for its log-probabilities",
    "bad_words": "use logit_bias={token id: -100}",
    "bad_words_ids": "use logit_bias={token id: -100}",
    "suppress_tokens": "use logit_bias={token id: -100}",
    "eos_token_id": "the checkpoint's own end-of-text ids are used; add others with stop_token_ids",
    "stop_strings": "use stop",
    "stop_sequences": "use stop",
    "random_seed": "use seed",
}


TokenId = Annotated[NonNegativeInt, Field(lt=2**31)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Logprobs = Annotated[NonNegativeInt, Field(le=MAX_LOGPROBS)]


class GenerateParamsConfig(ConfigModel):
    """What a caller may set for one call; it holds for every prompt of the call.

    The text ends at the first end-of-text token of the checkpoint (not with `ignore_eos`), at the first of
    `stop_token_ids`, at the first of the `stop` texts, after `max_new_tokens`, or where prompt and answer together
    reach `max_length`. The model's logits are changed by the penalties (`repetition_penalty` first), then `logit_bias`,
    then `allowed_token_ids`; tokens are drawn from the probabilities after `temperature`, then `top_k`, then `min_p`,
    then `top_p`. Log-probabilities are the model's own, before all of this.

    Raises:
        pydantic.ValidationError: an option is unknown, of the wrong type or out of range.
    """

    keeps_auto = frozenset({"stop"})  # a text to stop at, like any other
    hints = _HINTS

    prompt_length: NonNegativeInt | None = Field(
        default=None, description="tokens of the prompt; mii counts them itself"
    )
    max_length: PositiveInt | None = Field(
        default=None,
        description="most tokens of prompt plus answer; None: max_length of the model's config, else its own limit",
    )
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="most tokens to generate; None: up to max_length"
    )
    min_new_tokens: NonNegativeInt = Field(
        default=0, description="end-of-text and stop count only after this many tokens"
    )
    stream: bool = Field(default=False, description="set by mii itself; use pipe.stream(...) or streaming_fn=")
    ignore_eos: bool = Field(
        default=False, description="go on after end-of-text tokens; stop texts still end the answer"
    )
    return_full_text: bool = Field(default=False, description="put the prompt's text before the answer's")
    do_sample: bool = Field(default=True, description="draw tokens at random; False takes the most likely one")
    temperature: Number | None = Field(
        default=None,
        ge=0,
        description="above 1 flattens the probabilities, below 1 sharpens them; 0 is greedy, None is 1",
    )
    top_k: PositiveInt | None = Field(default=None, description="draw from the k most likely tokens; None turns it off")
    top_p: Number = Field(
        default=0.9, gt=0, le=1, description="draw from the most likely tokens that together reach this; 1 turns it off"
    )
    min_p: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="draw from tokens at least this fraction as likely as the best; 0 turns it off",
    )
    seed: Seed | None = Field(default=None, description="makes the answer repeatable; None: a new one each time")
    stop: list[str] = Field(
        default=[], description="a text, or a list of texts, at which the answer ends; not part of it"
    )
    stop_token_ids: list[TokenId] = Field(
        default=[], description="tokens that end the answer, also with ignore_eos; not part of its text"
    )
    skip_special_tokens: bool = Field(
        default=False, description="leave special tokens out of the answer's text; they are counted all the same"
    )
    repetition_penalty: Number = Field(
        default=1.0, gt=0, description="above 1 makes tokens of prompt and answer less likely; 1 turns it off"
    )
    presence_penalty: Penalty = Field(
        default=0.0, description="taken off the logits of tokens that the answer has, from -2 to 2; 0 turns it off"
    )
    frequency_penalty: Penalty = Field(
        default=0.0, description="the same for each time that the answer has them, from -2 to 2; 0 turns it off"
    )
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] = Field(
        default={}, description="token ids with what is added to their logits, from -100 to 100"
    )
    allowed_token_ids: list[TokenId] | None = Field(
        default=None, description="the only tokens that the answer may have; None allows all"
    )
    logprobs: Logprobs | None = Field(
        default=None,
        description="give log-probabilities of the answer's tokens, and of so many most likely ones in place of each; "
        "None gives none",
    )
    prompt_logprobs: Logprobs | None = Field(default=None, description="the same for the prompt's tokens")

    @classmethod
    def option_names(cls) -> list[str]:
        return [name for name in cls.model_fields if name not in ("prompt_length", "stream")]

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_a_list(cls, value: Any) -> Any:
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        return list(value) if isinstance(value, (tuple, set, frozenset)) else value

    @field_validator("stop")
    @classmethod
    def _stops_have_text(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text would end every answer at once; leave it out")
        return sorted(value)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _keys_are_numbers(cls, value: Any) -> Any:
        """JSON and protobuf have maps with texts as keys only."""
        if not isinstance(value, Mapping):
            return {} if value is None else value
        bias = {_token_id(key): each for key, each in value.items()}
        if len(bias) < len(value):
            raise ValueError("a token is named twice, as a number and as a text")
        return bias

    @field_validator("stop_token_ids", "allowed_token_ids", mode="before")
    @classmethod
    def _ids_are_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return [] if info.field_name == "stop_token_ids" else None
        value = value.tolist() if hasattr(value, "tolist") else value
        ids = list(value) if isinstance(value, (tuple, set, frozenset, range)) else value
        if ids == [] and info.field_name == "allowed_token_ids":
            raise ValueError("no token would be left to choose; None allows all")
        return ids

    def check_together(self) -> None:
        if self.prompt_length is not None and self.max_length is not None:
            if self.max_length <= self.prompt_length:
                raise ValueError(_too_long(self.prompt_length, self.max_length))
            if "max_new_tokens" not in self.model_fields_set:
                self.__dict__["max_new_tokens"] = self.max_length - self.prompt_length

    def resolve(self, prompt_length: int, max_length: int) -> int:
        """How many tokens may be generated after one prompt, at least 1.

        `max_length` of the call and of the engine both bound prompt plus answer exactly; `max_new_tokens` never extends
        them.

        Args:
            prompt_length: tokens of the prompt, special tokens included.
            max_length: the engine's limit for prompt plus answer, in tokens.

        Raises:
            PromptTooLongError: the prompt alone reaches the limit.
        """
        limit = max_length if self.max_length is None else min(self.max_length, max_length)
        room = limit - prompt_length
        if room < 1:
            raise PromptTooLongError(_too_long(prompt_length, limit))
        if "max_new_tokens" not in self.model_fields_set or self.max_new_tokens is None:
            return room
        return min(self.max_new_tokens, room)

    def sampling(self, seeds: random.Random) -> SamplingParams:
        """How tokens are chosen, in the engine's terms.

        Args:
            seeds: gives a seed where the call has none; seed this generator to make a whole run repeatable.
        """
        changes: dict[str, Any] = {
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
            "allowed_ids": tuple(sorted(set(self.allowed_token_ids or ()))),
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        if not self.do_sample or temperature < _GREEDY_BELOW:
            return SamplingParams(temperature=0.0, **changes)
        seed = seeds.getrandbits(63) if self.seed is None else self.seed
        return SamplingParams(temperature, self.top_k or 0, self.top_p, self.min_p, seed, **changes)

    def engine_request(
        self, uid: int, prompt_ids: list[int], *, max_length: int, stop_ids: Sequence[int], seeds: random.Random
    ) -> EngineRequest:
        """One prompt as the engine takes it.

        Args:
            uid: names the request.
            prompt_ids: the prompt's tokens.
            max_length: the engine's limit for prompt plus answer, in tokens.
            stop_ids: the end-of-text tokens; left out with `ignore_eos`, which `stop_token_ids` are not.
            seeds: see `sampling`.

        Raises:
            EmptyPromptError: there are no tokens.
            PromptTooLongError: they leave no room for an answer.
        """
        if not prompt_ids:
            raise EmptyPromptError("the prompt is empty and its tokenizer adds no tokens of its own; give it some text")
        max_new_tokens = self.resolve(len(prompt_ids), max_length)
        return EngineRequest(
            uid=uid,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(self.min_new_tokens, max_new_tokens),
            stop_ids=tuple(dict.fromkeys((*(() if self.ignore_eos else stop_ids), *self.stop_token_ids))),
            sampling=self.sampling(seeds),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def _token_id(key: Any) -> int:
    """A key of `logit_bias` as a number."""
    number = -1
    if isinstance(key, str):
        number = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
    elif hasattr(key, "__index__") and not isinstance(key, bool):
        number = operator.index(key)
    if not 0 <= number < 2**31:
        raise ValueError(f"it has the key {repr(key)[:40]}; its keys are token ids, as numbers or as texts of digits")
    return number


def _too_long(prompt_length: int, limit: int) -> str:
    return (
        f"the prompt has {prompt_length} tokens and prompt plus answer may have {limit} (max_length), which leaves no "
        "room for an answer; shorten the prompt or raise max_length as far as the model allows"
    )
