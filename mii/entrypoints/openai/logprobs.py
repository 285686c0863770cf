"""Log-probabilities as the two kinds of completions have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mii.grpc_related.proto.modelresponse_pb2 import TokenLogprob

__all__ = ["chat_logprobs", "completion_logprobs"]

# OpenAI's answers hold this for what is less likely than they say.
_LEAST = -9999.0


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion."""
    return {"content": [{**_entry(token), "top_logprobs": list(map(_entry, token.top))} for token in tokens]}


def completion_logprobs(tokens: Iterable[TokenLogprob], offset: int = 0) -> tuple[dict[str, Any], int]:
    """``choices[].logprobs`` of a completion.

    Args:
        tokens: with their log-probabilities.
        offset: characters of the text before the first of them.

    Returns:
        The object, and the offset after the last token.
    """
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = _text(token.token)
        result["tokens"].append(_name(token.token))
        result["token_logprobs"].append(_value(token))
        result["top_logprobs"].append({_name(each.token): _value(each) for each in token.top} or None)
        result["text_offset"].append(offset)
        offset += len(text)
    return result, offset


def _entry(token: TokenLogprob) -> dict[str, Any]:
    value = _value(token)
    raw = bytes(token.token)
    return {"token": _text(raw), "logprob": _LEAST if value is None else value, "bytes": list(raw)}


def _value(token: TokenLogprob) -> float | None:
    return max(token.logprob, _LEAST) if token.HasField("logprob") else None


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _name(raw: bytes) -> str:
    """The text of a token; of one that is a part of a character its bytes, so that different tokens differ."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
