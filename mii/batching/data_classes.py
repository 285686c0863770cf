"""What travels through a request's life: the answer that users get and the messages between a front and an engine.

Nothing here imports torch, so a front, a client or a test can use it at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec

from mii.constants import GenerationFinishReason

__all__ = [
    "MAX_LOGPROBS",
    "EngineRequest",
    "GenerationFinishReason",
    "Response",
    "SamplingParams",
    "StepOutput",
    "StreamedResponse",
    "TokenLogprob",
    "TokenOutput",
]

MAX_LOGPROBS = 100
"""Most alternatives that a request can have listed at each place of its text."""


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):
    """How likely the model found a token at one place of a text.

    It is the model's own distribution, before temperature, penalties, biases and filters, so it says what the model
    thinks and does not depend on how tokens are chosen.

    Args:
        token_id: The token.
        logprob: Natural logarithm of its probability; None for the first token of a prompt, which nothing comes before.
        top: The most likely tokens at this place, most likely first, equal ones by id; as many as were asked for.
        token: What the token adds to the text, as bytes: a token may be part of a character. Empty in what an engine
            says, which knows no text.
    """

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    token: bytes = b""

    def to_msg_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types: the token as text too, with U+FFFD for what is no whole character.

        JSON has no infinity: what the model gives no chance at all has -9999, as in OpenAI's answers.
        """
        return {
            "token_id": self.token_id,
            "token": self.token.decode(errors="replace"),
            "bytes": list(self.token),
            "logprob": None if self.logprob is None else max(self.logprob, -9999.0),
            "top": [each.to_msg_dict() for each in self.top],
        }

    @staticmethod
    def from_msg_dict(msg: Mapping[str, Any]) -> TokenLogprob:
        """The entry that `to_msg_dict` turned into `msg`."""
        top = tuple(TokenLogprob.from_msg_dict(each) for each in msg["top"])
        return TokenLogprob(msg["token_id"], msg["logprob"], top, bytes(msg["bytes"]))


@dataclass
class Response:
    """One prompt's answer, or one piece of it while streaming.

    Args:
        generated_text: The decoded answer, or the new piece of it.
        prompt_length: Tokens of the prompt, special tokens included.
        generated_length: Tokens generated so far, the one that ended the answer included.
        finish_reason: Why the answer ended; ``NONE`` while it still runs.
        logprobs: For each generated token (while streaming: each new one) how likely the model found it, the one that
            ended the answer included; None unless the call asked for it with `logprobs`.
        prompt_logprobs: The same for each token of the prompt, while streaming in the first piece; None unless the call
            asked for it with `prompt_logprobs`.

    ``str()`` and ``repr()`` are the text alone, so a printed list of responses is a list of texts. Responses are equal
    when their texts, lengths and reasons are.

    >>> response = Response("a library", 3, 2, GenerationFinishReason.STOP)
    >>> response, response.finish_reason == "stop"
    (a library, True)
    """

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: GenerationFinishReason
    logprobs: list[TokenLogprob] | None = field(default=None, compare=False, kw_only=True)
    prompt_logprobs: list[TokenLogprob] | None = field(default=None, compare=False, kw_only=True)

    def to_msg_dict(self) -> dict[str, Any]:
        """The four fields as plain JSON types; log-probabilities too, where there are some."""
        message: dict[str, Any] = {
            "generated_text": self.generated_text,
            "prompt_length": self.prompt_length,
            "generated_length": self.generated_length,
            "finish_reason": GenerationFinishReason(self.finish_reason).value,
        }
        for name in ("logprobs", "prompt_logprobs"):
            entries: Iterable[TokenLogprob] | None = getattr(self, name)
            if entries is not None:
                message[name] = [entry.to_msg_dict() for entry in entries]
        return message

    @staticmethod
    def from_msg_dict(msg: dict[str, Any]) -> Response:
        """The response that `to_msg_dict` turned into `msg`.

        Raises:
            KeyError: A field is missing.
            ValueError: The finish reason is none of ``stop``, ``length``, ``none``.
        """
        return Response(
            generated_text=msg["generated_text"],
            prompt_length=msg["prompt_length"],
            generated_length=msg["generated_length"],
            finish_reason=GenerationFinishReason(msg["finish_reason"]),
            logprobs=_read_logprobs(msg.get("logprobs")),
            prompt_logprobs=_read_logprobs(msg.get("prompt_logprobs")),
        )

    def __repr__(self) -> str:
        return self.generated_text

    def __str__(self) -> str:
        return self.generated_text


def _read_logprobs(entries: Iterable[Mapping[str, Any]] | None) -> list[TokenLogprob] | None:
    return None if entries is None else [TokenLogprob.from_msg_dict(entry) for entry in entries]


@dataclass(repr=False)
class StreamedResponse(Response):
    """A piece of one prompt's answer: a `Response` that also says whose piece it is.

    Args:
        index: Position of the prompt in the call.
    """

    index: int = 0


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token of one request is chosen.

    The model's logits are changed by the penalties, the biases and the allowed tokens, in this order, then divided by
    the temperature, then filtered by top-k, min-p and top-p.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_k: Only the k most likely tokens; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        min_p: Only tokens at least this share as likely as the most likely one; 0 is off.
        seed: Key of the random numbers, 0 to 2**63 - 1; with the position it fixes each draw.
        repetition_penalty: Tokens of prompt or answer: positive logits are divided by it, negative ones multiplied; 1
            is off.
        frequency_penalty: Taken off a token's logit for each time that the answer has it; 0 is off.
        presence_penalty: Taken off the logit of each token that the answer has; 0 is off.
        logit_bias: Added to the logits of these tokens.
        allowed_ids: Only these tokens are ever chosen; empty: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_ids: tuple[int, ...] = ()

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it in a way that is not the model's."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from anything but the model's own logits."""
        return self.penalizes or bool(self.logit_bias or self.allowed_ids)


class EngineRequest(msgspec.Struct, omit_defaults=True):
    """One prompt as an engine takes it.

    Args:
        uid: Names the request; unique among those that the engine holds.
        prompt_ids: The prompt's tokens, at least one.
        max_new_tokens: Tokens to generate at most, at least one.
        min_new_tokens: No token of `stop_ids` is chosen before this many tokens are generated.
        stop_ids: Tokens that end the request; the one that does is the last of its tokens.
        sampling: How tokens are chosen.
        logprobs: Say of each generated token how likely the model found it, and the same of this many most likely
            tokens in its place; None: say nothing.
        prompt_logprobs: The same for each token of the prompt. Such a prompt is computed in full: what the cache has of
            it is not used.
    """

    uid: int
    prompt_ids: list[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenOutput(msgspec.Struct, omit_defaults=True, gc=False):
    """What one engine step says about one request.

    Args:
        uid: The request.
        token_ids: Its new tokens.
        finish_reason: ``None`` while it runs, else ``"stop"``, ``"length"`` or ``"error"``.
        error: What went wrong, a sentence, when `finish_reason` is ``"error"``.
        logprobs: An entry for each of the new tokens, where the request asks for them.
        prompt_logprobs: An entry for each token of the prompt, with the request's first new token, where it asks for
            them.
    """

    uid: int
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class StepOutput(msgspec.Struct, omit_defaults=True, gc=False):
    """What one engine step says about all its requests: columns, since most of them get a token and go on.

    Args:
        uids: Requests that go on.
        token_ids: The new token of each of them.
        others: Requests of which there is more to say.

    As an iterable it is a `TokenOutput` of each request.

    >>> [output.uid for output in StepOutput([7, 8], [3, 5], [TokenOutput(6, [2], "stop")])]
    [7, 8, 6]
    """

    uids: list[int] = []
    token_ids: list[int] = []
    others: list[TokenOutput] = []

    @staticmethod
    def of(outputs: Iterable[TokenOutput]) -> StepOutput:
        """These outputs, in columns where they can be."""
        step = StepOutput([], [], [])
        for output in outputs:
            if len(output.token_ids) == 1 and output == TokenOutput(output.uid, output.token_ids):
                step.uids.append(output.uid)
                step.token_ids += output.token_ids
            else:
                step.others.append(output)
        return step

    def __len__(self) -> int:
        return len(self.uids) + len(self.others)

    def __iter__(self) -> Iterator[TokenOutput]:
        return chain(map(TokenOutput, self.uids, map(list, zip(self.token_ids, strict=True))), self.others)
