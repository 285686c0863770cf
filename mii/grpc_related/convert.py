"""Python values in and out of the protocol's messages.

>>> request = pack_request(["DeepSpeed is", [1, 2, 3]], {"top_p": 0.9, "stop": ["\\n"], "seed": None})
>>> prompts_of(request)
['DeepSpeed is', [1, 2, 3]]
>>> sorted(unpack_options(request).items())
[('seed', None), ('stop', ['\\n']), ('top_p', 0.9)]
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE

from mii.batching.data_classes import GenerationFinishReason, StreamedResponse, TokenLogprob
from mii.constants import GRPC_MAX_MESSAGE_BYTES
from mii.errors import PromptEncodingError, RequestError
from mii.grpc_related.proto.modelresponse_pb2 import (
    Dictionary,
    List,
    MultiStringRequest,
    SingleGenerationReply,
    TokenIds,
    Value,
)
from mii.grpc_related.proto.modelresponse_pb2 import TokenLogprob as TokenLogprobMessage

__all__ = [
    "pack_logprobs",
    "pack_request",
    "pack_value",
    "positions_of",
    "prompts_of",
    "read_logprobs",
    "read_reply",
    "unpack_options",
    "unpack_value",
]

_INT64 = range(-(1 << 63), 1 << 63)
_REASONS = {reason.value: reason for reason in GenerationFinishReason}
_REASONS |= {"": GenerationFinishReason.NONE, "error": GenerationFinishReason.NONE}


def pack_request(prompts: Iterable[str | Sequence[int]], options: Mapping[str, Any]) -> MultiStringRequest:
    """A call as it travels: texts, then prompts that are token ids, and their places where those are mixed.

    Raises:
        PromptEncodingError: a text is not valid Unicode.
        RequestError: a prompt or an option's value does not travel, or all together are too long.
    """
    texts: dict[int, str] = {}
    tokens: dict[int, Sequence[int]] = {}
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            texts[index] = prompt
        else:
            tokens[index] = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    places = [*texts, *tokens]
    try:
        request = MultiStringRequest(
            request=texts.values(),
            token_prompts=[TokenIds(ids=prompt) for prompt in tokens.values()],
            positions=[] if places == sorted(places) else places,
            query_kwargs={name: _pack_option(name, value) for name, value in options.items()},
        )
    except UnicodeEncodeError as error:
        raise PromptEncodingError(
            f"a prompt or option is not valid Unicode: {error.object[error.start]!r} at character {error.start} is "
            "half of a surrogate pair; decode the text from its bytes as UTF-8"
        ) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"a prompt cannot be sent; give text, or token ids from 0 to 2**31 - 1: {error}") from None
    if (size := request.ByteSize()) > GRPC_MAX_MESSAGE_BYTES:
        raise RequestError(
            f"the prompts have {size} bytes, and a call may have {GRPC_MAX_MESSAGE_BYTES}; send fewer at once"
        )
    return request


def prompts_of(request: MultiStringRequest) -> list[str | list[int]]:
    """The prompts of a call in the order in which they travel; `positions_of` has their places."""
    return [*request.request, *(list(prompt.ids) for prompt in request.token_prompts)]


def positions_of(request: MultiStringRequest) -> list[int]:
    """For each of `prompts_of` its place in the call that the client made.

    Raises:
        RequestError: there are not as many places as prompts, or some are equal or negative.
    """
    count = len(request.request) + len(request.token_prompts)
    if not request.positions:
        return list(range(count))
    places = list(request.positions)
    if len(places) != count or len(set(places)) != count or min(places) < 0:
        raise RequestError(f"a call has {count} prompts and the positions {places}; give each prompt one of its own")
    return places


def unpack_options(request: MultiStringRequest) -> dict[str, Any]:
    """The generation options of a call."""
    return {name: unpack_value(value) for name, value in request.query_kwargs.items()}


def pack_value(value: Any) -> Value:
    """A Python value as it travels: text, numbers (also an array library's), booleans, None, lists, dicts, arrays.

    Raises:
        RequestError: it is none of these, or an integer of more than 64 bits.
    """
    if hasattr(value, "tolist"):  # an array library's scalar or array
        value = value.tolist()
    if value is None:
        return Value(nvalue=NULL_VALUE)
    if isinstance(value, bool):
        return Value(bvalue=value)
    if isinstance(value, str):
        return Value(svalue=value)
    if isinstance(value, Integral) and int(value) in _INT64:
        return Value(ivalue=int(value))
    if isinstance(value, Real) and not isinstance(value, Integral):
        return Value(fvalue=float(value), dvalue=float(value))
    if isinstance(value, Mapping):
        return Value(mvalue=Dictionary(values={str(name): pack_value(item) for name, item in value.items()}))
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return Value(lvalue=List(values=[pack_value(item) for item in value]))
    raise RequestError(
        f"{value!r} of type {type(value).__name__} cannot be sent; send text, numbers of up to 64 bits, booleans, "
        "None, lists or dicts"
    )


def _pack_option(name: str, value: Any) -> Value:
    try:
        return pack_value(value)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def unpack_value(value: Value) -> Any:
    """The Python value of a message; one that says nothing is None."""
    kind = value.WhichOneof("oneof_values")
    if kind == "mvalue":
        return {name: unpack_value(item) for name, item in value.mvalue.values.items()}
    if kind == "lvalue":
        return [unpack_value(item) for item in value.lvalue.values]
    if kind is None or kind == "nvalue":
        return None
    if kind == "fvalue":
        return value.dvalue if value.HasField("dvalue") else _shortest(value.fvalue)
    return getattr(value, kind)


def read_reply(reply: SingleGenerationReply) -> StreamedResponse:
    """An answer, or a piece of one. One that ended with an error has no reason, and what text there was.

    Raises:
        KeyError: the finish reason is none that this version knows.
    """
    return StreamedResponse(
        generated_text=reply.response,
        prompt_length=reply.prompt_tokens,
        generated_length=reply.generated_tokens,
        finish_reason=_REASONS[reply.finish_reason],
        index=reply.index,
        logprobs=read_logprobs(reply.logprobs),
        prompt_logprobs=read_logprobs(reply.prompt_logprobs),
    )


def pack_logprobs(entries: Iterable[TokenLogprob]) -> list[TokenLogprobMessage]:
    """Log-probabilities as they travel."""
    return [
        TokenLogprobMessage(
            token_id=entry.token_id, token=entry.token, logprob=entry.logprob, top=pack_logprobs(entry.top)
        )
        for entry in entries
    ]


def read_logprobs(entries: Sequence[TokenLogprobMessage]) -> list[TokenLogprob] | None:
    """Log-probabilities that came; None: there are none."""
    return [_read_logprob(entry) for entry in entries] if entries else None


def _read_logprob(entry: TokenLogprobMessage) -> TokenLogprob:
    logprob = entry.logprob if entry.HasField("logprob") else None
    return TokenLogprob(entry.token_id, logprob, tuple(map(_read_logprob, entry.top)), entry.token)


def _shortest(number: float) -> float:
    """What a caller wrote who had only 32 bits to send it: 0.9 and not 0.8999999761581421."""
    for digits in (6, 7, 8):
        short = float(f"{number:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", number):
            return short
    return number
