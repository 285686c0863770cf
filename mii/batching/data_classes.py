"""What travels through a request's life: the answer that users get and the messages between a front and an engine.

Nothing here imports torch, so a front, a client or a test can use it at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from mii.constants import GenerationFinishReason

__all__ = ["EngineRequest", "GenerationFinishReason", "Response", "SamplingParams", "StreamedResponse", "TokenOutput"]


@dataclass
class Response:
    """One prompt's answer, or one piece of it while streaming.

    Args:
        generated_text: The decoded answer, or the new piece of it.
        prompt_length: Tokens of the prompt, special tokens included.
        generated_length: Tokens generated so far, the one that ended the answer included.
        finish_reason: Why the answer ended; ``NONE`` while it still runs.

    ``str()`` and ``repr()`` are the text alone, so a printed list of responses is a list of texts.

    >>> response = Response("a library", 3, 2, GenerationFinishReason.STOP)
    >>> response, response.finish_reason == "stop"
    (a library, True)
    """

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: GenerationFinishReason

    def to_msg_dict(self) -> dict[str, Any]:
        """The four fields as plain JSON types."""
        return {
            "generated_text": self.generated_text,
            "prompt_length": self.prompt_length,
            "generated_length": self.generated_length,
            "finish_reason": GenerationFinishReason(self.finish_reason).value,
        }

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
        )

    def __repr__(self) -> str:
        return self.generated_text

    def __str__(self) -> str:
        return self.generated_text


@dataclass(repr=False)
class StreamedResponse(Response):
    """A piece of one prompt's answer: a `Response` that also says whose piece it is.

    Args:
        index: Position of the prompt in the call.
    """

    index: int = 0


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token of one request is chosen.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_k: Only the k most likely tokens; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        min_p: Only tokens at least this share as likely as the most likely one; 0 is off.
        seed: Key of the random numbers, 0 to 2**63 - 1; with the position it fixes each draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class EngineRequest(msgspec.Struct):
    """One prompt as an engine takes it.

    Args:
        uid: Names the request; unique among those that the engine holds.
        prompt_ids: The prompt's tokens, at least one.
        max_new_tokens: Tokens to generate at most, at least one.
        min_new_tokens: No token of `stop_ids` is chosen before this many tokens are generated.
        stop_ids: Tokens that end the request; the one that does is the last of its tokens.
        sampling: How tokens are chosen.
    """

    uid: int
    prompt_ids: list[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()


class TokenOutput(msgspec.Struct):
    """What one engine step says about one request.

    Args:
        uid: The request.
        token_ids: Its new tokens.
        finish_reason: ``None`` while it runs, else ``"stop"``, ``"length"`` or ``"error"``.
        error: What went wrong, a sentence, when `finish_reason` is ``"error"``.
    """

    uid: int
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
