"""Types of request fields whose wrong values are reported at the first one, however many there are."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from pydantic import PlainValidator, WithJsonSchema

__all__ = ["Bias", "Limit", "Messages", "Prompt", "Stop", "TokenIds", "Tools"]

_MOST_PROMPTS = 2048
_MOST_STOPS = 64
_PROMPTS = "a string, a list of strings, a list of token ids, or a list of such lists"

PlainPrompt: TypeAlias = str | list[str] | list[int] | list[list[int]]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompt(value: Any) -> PlainPrompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be {_PROMPTS}")
    if type(value[0]) is int:
        kind = "a list of token ids" if _is_ids(value) else ""
    elif isinstance(value[0], str):
        kind = "texts" if all(isinstance(item, str) for item in value) else ""
    else:
        kind = "lists of token ids" if all(map(_is_ids, value)) else ""
    if not kind:
        raise ValueError(f"mixes kinds of prompts; it must be {_PROMPTS}")
    if kind != "a list of token ids" and len(value) > _MOST_PROMPTS:
        raise ValueError(f"has {len(value)} prompts, and one request may have {_MOST_PROMPTS}; send several requests")
    return value


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings")
    if "" in texts:
        raise ValueError("an empty string would end every answer at once; leave it out")
    if len(texts) > _MOST_STOPS:
        raise ValueError(f"has {len(texts)} strings; give {_MOST_STOPS} at most")
    return texts


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    if not _is_ids(value):
        raise ValueError("must be a list of token ids")
    return list(value)


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    try:
        return {int(token): _number(bias) for token, bias in value.items()}
    except ValueError:
        raise ValueError("must have token ids as names and numbers as values") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _message(value: Any) -> dict[str, Any]:
    """A turn as templates want it: its text parts joined, and what a called function was given as an object.

    What else is in it is the template's affair.
    """
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ValueError("a message must be an object with 'role', a string, and 'content'")
    if "content" not in value and not value.get("tool_calls"):
        raise ValueError(f"the message of role {value['role']!r} has no 'content'")
    content, calls = value.get("content"), value.get("tool_calls")
    turn = {**value, "content": _joined(content) if isinstance(content, list) else _text(content)}
    return {**turn, "tool_calls": [_tool_call(call) for call in calls]} if isinstance(calls, list) else turn


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object: OpenAI has them as JSON in a string, which a template would quote again."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _text(content: Any) -> str:
    if content is None:  # no text beside a tool's call; templates add texts to it
        return ""
    if isinstance(content, str):
        return content
    raise ValueError("content must be a string or a list of parts {'type': 'text', 'text': '...'}")


def _joined(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("content must be a string or a list of parts {'type': 'text', 'text': '...'}")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content of type {part['type']!r} is not supported; only text is")
        texts.append(part["text"])
    return "\n".join(texts)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of messages, at least one")
    return [_message(item) for item in value]


def _tools(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("must be a list of objects that describe functions")
    return value


def _limit(value: Any) -> int | None:
    """A number of tokens; null is as good as nothing."""
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise ValueError("must be an integer of at least 0")
    return value


def _or_null(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [*schemas, {"type": "null"}]}


_STRING, _ID = {"type": "string"}, {"type": "integer", "minimum": 0}
_STRINGS, _IDS, _OBJECTS = ({"type": "array", "items": item} for item in (_STRING, _ID, {"type": "object"}))
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _STRING},
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": _STRING, "content": _or_null(_STRING, {"type": "array", "items": _PART})},
}
_PROMPT = {
    "anyOf": [
        _STRING,
        {**_STRINGS, "minItems": 1, "maxItems": _MOST_PROMPTS},
        {**_IDS, "minItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": _MOST_PROMPTS},
    ]
}
_BIAS = {"type": "object", "additionalProperties": {"type": "number"}, "propertyNames": {"pattern": "^[0-9]+$"}}

Bias = Annotated[dict[int, float], PlainValidator(_bias), WithJsonSchema(_or_null(_BIAS))]
Limit = Annotated[int | None, PlainValidator(_limit), WithJsonSchema(_or_null(_ID))]
Messages = Annotated[
    list[dict[str, Any]],
    PlainValidator(_messages),
    WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1}),
]
Prompt = Annotated[PlainPrompt, PlainValidator(_prompt), WithJsonSchema(_PROMPT)]
Stop = Annotated[list[str], PlainValidator(_stop), WithJsonSchema(_or_null(_STRING, _STRINGS))]
TokenIds = Annotated[list[int], PlainValidator(_ids), WithJsonSchema(_or_null(_IDS))]
Tools = Annotated[list[dict[str, Any]], PlainValidator(_tools), WithJsonSchema(_or_null(_OBJECTS))]
