"""What is sent for every token, as protobuf writes it, made from bytes: a message object for each costs three times
as much, which is most of what a front computes. Whoever reads it needs nothing of this.

>>> raw = reply_bytes(CallReply(call=3, response=[SingleGenerationReply(response="a", finish_reason="none")]))
>>> ServerMessage.FromString(raw).replies[0].response[0].response
'a'
"""

from __future__ import annotations

import struct
from functools import lru_cache

from mii.grpc_related.proto.modelresponse_pb2 import CallReply, ServerMessage, SingleGenerationReply

__all__ = ["reply_bytes", "running_bytes"]


def _tag(message: type, field: str, kind: int) -> bytes:
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | kind])  # type: ignore[attr-defined]


_VARINT, _BYTES, _FLOAT = 0, 2, 5
_REPLIES = _tag(ServerMessage, "replies", _BYTES)
_CALL, _RESPONSE = _tag(CallReply, "call", _VARINT), _tag(CallReply, "response", _BYTES)
_TEXT = _tag(SingleGenerationReply, "response", _BYTES)
_GENERATED = _tag(SingleGenerationReply, "generated_tokens", _VARINT)
_TIME, _MODEL_TIME = (_tag(SingleGenerationReply, field, _FLOAT)[0] for field in ("time_taken", "model_time_taken"))
_times = struct.Struct("<BfBf").pack
_FIXED_BYTES = len(_TEXT) + len(_GENERATED) + 10  # of a piece: what stands before numbers, and its times
_SMALL = [bytes([number]) for number in range(128)]


def running_bytes(
    call: int, text: str, generated: int, seconds: float, model_seconds: float, index: int, prompt: int
) -> bytes:
    """A part of a ServerMessage: a reply with a piece of one answer that goes on.

    Args:
        call: its number.
        text: of the piece.
        generated: tokens of the answer so far.
        seconds, model_seconds: `time_taken` and `model_time_taken`.
        index: the prompt's place in the call.
        prompt: tokens of the prompt.
    """
    head, same = _same(call, index, prompt)
    raw, count = text.encode(), _number(generated)
    text_size = _number(len(raw))
    piece_size = len(text_size) + len(raw) + len(count) + len(same) + _FIXED_BYTES
    size = _number(piece_size)
    whole = _number(len(head) + len(size) + piece_size)
    times = _times(_TIME, seconds, _MODEL_TIME, model_seconds)
    return b"".join((_REPLIES, whole, head, size, _TEXT, text_size, raw, _GENERATED, count, times, same))


def reply_bytes(reply: CallReply) -> bytes:
    """A part of a ServerMessage: any reply."""
    raw: bytes = reply.SerializeToString()
    return _REPLIES + _number(len(raw)) + raw


@lru_cache(4096)
def _same(call: int, index: int, prompt: int) -> tuple[bytes, bytes]:
    """What all pieces of an answer that goes on have in common: before the piece's size, and at its end."""
    raw: bytes = SingleGenerationReply(finish_reason="none", index=index, prompt_tokens=prompt).SerializeToString()
    return _CALL + _number(call) + _RESPONSE, raw


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth bit."""
    if value < 128:
        return _SMALL[value]
    if value < 1 << 14:
        return (value & 127 | 128 | value >> 7 << 8).to_bytes(2, "little")
    return bytes((value & 127 | 128,)) + _number(value >> 7)
