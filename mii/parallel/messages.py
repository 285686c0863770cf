"""What the ranks of a group say to each other besides numbers, as MessagePack over ZeroMQ.

Rank 0 listens (ROUTER), the others connect (DEALER). Each begins with `Hello` once its part of the model is loaded, and
again once it knows how many KV blocks it has room for, and gets `Welcome` or `Refused`. From then on `Work` comes for
every step, until `End`.
"""

from __future__ import annotations

import msgspec

from mii.batching.data_classes import EngineRequest

__all__ = ["End", "Failed", "Hello", "Refused", "ToFirst", "ToOthers", "Welcome", "Work", "decode_to_first",
           "decode_to_others", "encode"]  # fmt: skip


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A rank has loaded its part.

    Args:
        rank: which one.
        versions: of mii and torch.
        options: how it was asked to run the model.
        weights: a digest of the checkpoint.
        blocks: KV blocks that it has room for; 0: it does not know yet.
    """

    rank: int
    versions: str
    options: str
    weights: str
    blocks: int


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A rank cannot go on, and why."""

    rank: int
    reason: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """All ranks fit together.

    Args:
        blocks: KV blocks that each of them makes.
    """

    blocks: int


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The group ends, and why."""

    reason: str


class Work(msgspec.Struct, tag="work", frozen=True, omit_defaults=True):
    """A step.

    Args:
        digest: of the step that rank 0 has planned.
        commands: what comes before it, in order: requests to take, and uids of requests to abort.
    """

    digest: int
    commands: list[EngineRequest | int] = []


class End(msgspec.Struct, tag="end", frozen=True):
    """Rank 0 is done."""


ToFirst = Hello | Failed
ToOthers = Welcome | Refused | Work | End

encode = msgspec.msgpack.Encoder().encode
decode_to_first = msgspec.msgpack.Decoder(ToFirst).decode
decode_to_others = msgspec.msgpack.Decoder(ToOthers).decode
