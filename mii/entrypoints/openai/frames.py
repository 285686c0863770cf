"""Answers and stream events of the OpenAI routes, as JSON bytes.

A stream's events differ in little but their text, so everything around it is made once for each answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

import mii
from mii.entrypoints.http.backend import Piece, error_of_answer
from mii.entrypoints.openai.logprobs import chat_logprobs, completion_logprobs

__all__ = ["FINGERPRINT", "ChatFrames", "CompletionFrames", "Frames", "Usage", "new_id"]

_encode = msgspec.json.Encoder().encode
FINGERPRINT = f"mii-{mii.__version__}"
"""Answers with the same seed may differ where this does."""


def new_id(kind: str) -> str:
    """A new name for an answer, such as "chatcmpl-..."."""
    return f"{kind}-{uuid.uuid4().hex}"


class Usage:
    """Counts of tokens, by what the pieces of the answers say.

    Args:
        choices: answers to each prompt; a prompt counts once.
    """

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._prompts: dict[int, int] = {}
        self._generated: dict[int, int] = {}

    def add(self, piece: Piece) -> None:
        self._prompts[piece.index // self._choices] = piece.prompt_tokens
        self._generated[piece.index] = piece.generated_tokens

    def numbers(self, answers: bool = True) -> dict[str, int]:
        """The object `usage`. `answers`: false where they were thrown away."""
        prompts, generated = sum(self._prompts.values()), sum(self._generated.values()) if answers else 0
        return {"prompt_tokens": prompts, "total_tokens": prompts + generated, "completion_tokens": generated}


class Frames:
    """Events of one stream.

    Args:
        name: the answer's id.
        kind: its `object`.
        model: what the request called the model.
        choices: answers to each prompt.
        include_usage: whether a last event counts tokens.
    """

    def __init__(self, name: str, kind: str, model: str, choices: int, include_usage: bool) -> None:
        head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self._head = b"data: " + _encode({**head, "system_fingerprint": FINGERPRINT})[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage
        self.usage = Usage(choices)
        self._affixes: dict[int, tuple[bytes, bytes]] = {}

    def opening(self) -> bytes:
        """Events that come before any text."""
        return b""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """Events of pieces; nothing where they have nothing to show.

        Raises:
            ApiError: an answer has failed.
        """
        return b"".join(map(self._piece, pieces))

    def closing(self, answers: bool = True) -> bytes:
        """Events that come after everything else. `answers`: see `Usage.numbers`."""
        if not self._include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + _encode(self.usage.numbers(answers)) + b"}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        """An event with one choice."""
        return self._head + b',"choices":[' + _encode(choice) + b"]" + self._tail

    def _piece(self, piece: Piece) -> bytes:
        if piece.error:
            raise error_of_answer(piece)
        self.usage.add(piece)
        text = self._text(piece) if piece.response or piece.logprobs else b""
        return text if piece.finish_reason in ("none", "") else text + self._end(piece)

    def _text(self, piece: Piece) -> bytes:
        if piece.logprobs:
            return self.choice(self._content(piece.index, piece.response, self._logprobs(piece)))
        affixes = self._affixes.get(piece.index)
        if affixes is None:
            before, _, after = self.choice(self._content(piece.index, "\0", None)).partition(rb'"\u0000"')
            affixes = self._affixes[piece.index] = before, after
        return affixes[0] + _encode(piece.response) + affixes[1]

    def _content(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _end(self, piece: Piece) -> bytes:
        raise NotImplementedError

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class ChatFrames(Frames):
    """Events of a chat completion.

    Args:
        role: of the answer.
        others: see `Frames`.
    """

    def __init__(self, model: str, choices: int, include_usage: bool, role: str) -> None:
        super().__init__(new_id("chatcmpl"), "chat.completion.chunk", model, choices, include_usage)
        self._role, self._choices = role, choices

    def opening(self) -> bytes:
        delta = {"role": self._role, "content": ""}
        blank = {"delta": delta, "logprobs": None, "finish_reason": None}
        return b"".join(self.choice({"index": index, **blank}) for index in range(self._choices))

    def _content(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def _end(self, piece: Piece) -> bytes:
        return self.choice({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return chat_logprobs(piece.logprobs)


class CompletionFrames(Frames):
    """Events of a completion.

    Args:
        echo: text to put before the answer of each index; empty: nothing.
        others: see `Frames`.
    """

    def __init__(self, model: str, choices: int, include_usage: bool, echo: Sequence[str] = ()) -> None:
        super().__init__(new_id("cmpl"), "text_completion", model, choices, include_usage)
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def opening(self) -> bytes:
        return b"".join(self.choice(self._content(index, text, None)) for index, text in enumerate(self._echo))

    def _content(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _end(self, piece: Piece) -> bytes:
        return self.choice({**self._content(piece.index, "", None), "finish_reason": piece.finish_reason})

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        offset = self._offsets.get(piece.index, 0)
        result, self._offsets[piece.index] = completion_logprobs(piece.logprobs, offset)
        return result
