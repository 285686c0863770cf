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
from mii.entrypoints.http.metrics import Counts
from mii.entrypoints.openai.logprobs import chat_logprobs, completion_logprobs
from mii.grpc_related.answers import runs

__all__ = ["FINGERPRINT", "ChatFrames", "CompletionFrames", "Frames", "new_id", "usage"]

_encode = msgspec.json.Encoder().encode
FINGERPRINT = f"mii-{mii.__version__}"
"""Answers with the same seed may differ where this does."""


def new_id(kind: str) -> str:
    """A new name for an answer, such as "chatcmpl-..."."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(counts: Counts, choices: int, answers: bool = True) -> dict[str, int]:
    """The object `usage`.

    Args:
        counts: tokens of each answer.
        choices: answers to each prompt, which counts once.
        answers: false where they were thrown away.
    """
    by_prompt = {index // choices: tokens for index, tokens in counts.prompts.items()}
    prompts, generated = sum(by_prompt.values()), sum(counts.generated.values()) if answers else 0
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
        self._choices, self._include_usage = choices, include_usage
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

    def closing(self, counts: Counts, answers: bool = True) -> bytes:
        """Events that come after everything else. `counts`, `answers`: see `usage`."""
        if not self._include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + _encode(usage(counts, self._choices, answers)) + b"}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        """An event with one choice."""
        return self._head + b',"choices":[' + _encode(choice) + b"]" + self._tail

    def _piece(self, piece: Piece) -> bytes:
        if not runs(piece):
            if piece.error:
                raise error_of_answer(piece)
            return self._text(piece) + self._end(piece)
        return self._text(piece)

    def _text(self, piece: Piece) -> bytes:
        text, index = piece.response, piece.index
        if piece.logprobs:
            return self.choice(self._content(index, text, self._logprobs(piece)))
        if not text:
            return b""
        affixes = self._affixes.get(index)
        if affixes is None:
            before, _, after = self.choice(self._content(index, "\0", None)).partition(rb'"\u0000"')
            affixes = self._affixes[index] = before, after
        return affixes[0] + _encode(text) + affixes[1]

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
        self._role = role

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
