"""What a replica's front and its engine process say to each other, as MessagePack over a ZeroMQ socket.

The engine listens (ROUTER), the front connects (DEALER) and begins with `Hello`, which the engine answers with `Ready`.
Then requests go one way and, once a step, tokens come back. A front that connects anew, or is gone, takes its
requests with it: the engine aborts them. One connection is one life of both: whoever loses it starts over with `Hello`.

>>> decode_to_engine(encode(Abort([3, 4])))
Abort(uids=[3, 4])
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from mii.batching.data_classes import EngineRequest, StepOutput

__all__ = [
    "Abort",
    "Add",
    "Answer",
    "Ask",
    "Died",
    "EngineInfo",
    "EngineStats",
    "Hello",
    "Ready",
    "Refused",
    "Step",
    "ToEngine",
    "ToFront",
    "decode_to_engine",
    "decode_to_front",
    "encode",
]

T = TypeVar("T")


class EngineInfo(msgspec.Struct, frozen=True):
    """What a front must know of an engine, fixed for the engine's life.

    Args:
        max_length: tokens of prompt plus answer that one request can have at most.
        vocab_size: token ids are below this.
        stop_ids: the model's end-of-text tokens.
        num_blocks: blocks of the KV cache.
        block_size: tokens that a block holds.
        device: "cpu" or "cuda".
        dtype: of the weights: "bf16", "fp16" or "fp32".
        version: of mii.
        pid: of the engine process.
    """

    max_length: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    num_blocks: int
    block_size: int
    device: str = "cpu"
    dtype: str = "fp32"
    version: str = ""
    pid: int = 0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """An engine's counters after a step.

    Args:
        running: requests that hold a slot.
        waiting: requests in the queue.
        free_blocks: KV blocks that nobody uses.
        num_blocks: KV blocks there are.
        preemptions: requests put back into the queue for want of blocks, since the start.
        prefix_hit_tokens: prompt tokens that were found in the cache, since the start.
        prefix_queried_tokens: prompt tokens that were looked for in the cache, since the start.
        steps: steps since the start.
    """

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_queried_tokens: int = 0
    steps: int = 0


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A front is there. Whatever other front the engine worked for is gone."""


class Add(msgspec.Struct, tag="add", frozen=True):
    """Requests to run. Each is taken or refused on its own."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Requests whose tokens nobody wants any more; unknown ones are ignored. No word of them comes back."""

    uids: list[int]


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """How is the engine? Answered when the step that runs is over.

    Args:
        id: names the question; the answer carries it.
    """

    id: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine's answer to `Hello`: it can take requests."""

    info: EngineInfo


class Step(msgspec.Struct, tag="step", frozen=True):
    """What one step said about requests, and the state that it left."""

    outputs: StepOutput
    stats: EngineStats


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """A request that can never run.

    Args:
        uid: the request.
        error: why, in a sentence for whoever sent it.
        kind: name of the exception in `mii.errors` that says the same.
    """

    uid: int
    error: str
    kind: str = "RequestError"


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """The answer to `Ask`."""

    id: int
    stats: EngineStats


class Died(msgspec.Struct, tag="died", frozen=True):
    """The engine has failed, all its requests are lost, and its process ends now."""

    error: str


ToEngine = Hello | Add | Abort | Ask
ToFront = Ready | Step | Refused | Answer | Died

encode = msgspec.msgpack.Encoder().encode
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def decode_to_engine(message: bytes | memoryview) -> ToEngine:
    """What a front says.

    Raises:
        msgspec.DecodeError: it is no message.
    """
    return _checked(_to_engine, message)


def decode_to_front(message: bytes | memoryview) -> ToFront:
    """What an engine says.

    Raises:
        msgspec.DecodeError: it is no message.
    """
    return _checked(_to_front, message)


def _checked(decoder: msgspec.msgpack.Decoder[T], message: bytes | memoryview) -> T:
    try:
        return decoder.decode(message)
    except UnicodeDecodeError as error:  # msgspec before 0.23 lets it through as it is
        raise msgspec.DecodeError(f"a text of it is not UTF-8: {error}") from None
