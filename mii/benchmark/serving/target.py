"""What requests are sent to."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from mii.benchmark.serving.trace import Trace
from mii.benchmark.serving.work import Ask

__all__ = ["GRPC", "Target", "TargetSpec", "make_target"]

GRPC = ("grpc", "rpc")
"""The APIs of gRPC: streams that share an RPC, as those of `MIIClient.astream` do, and an RPC for each stream."""


class TargetSpec(msgspec.Struct, frozen=True):
    """Where requests go and what they say besides their prompts; travels to worker processes.

    Args:
        api: "grpc", "rpc", "mii", "completions" or "chat".
        address: ``host:port`` for gRPC (the first two), else the URL that requests are posted to.
        model: the name that OpenAI's routes want.
        api_key: sent as ``Authorization: Bearer``; empty: none.
        options: generation options of every request, by their names in that API.
        stream: whether answers are read as they are made.
        timeout: seconds that a request may take.
        exact: an answer that is shorter than asked for is an error.
    """

    api: str
    address: str
    model: str = ""
    api_key: str = ""
    options: dict[str, Any] = {}
    stream: bool = True
    timeout: float = 600.0
    exact: bool = True


class Target(Protocol):
    """A server. Used within one event loop."""

    def pack(self, ask: Ask) -> bytes:
        """The request as it travels, made before the clock runs."""

    async def send(self, payload: bytes, trace: Trace) -> None:
        """Sends a request and notes in `trace` what comes, until the answer is complete.

        Raises:
            Failed: it will not be complete.
        """

    async def close(self) -> None:
        """Closes its connections."""


def make_target(spec: TargetSpec) -> Target:
    """The target that `spec` says. Nothing is sent yet."""
    if spec.api in GRPC:
        from mii.benchmark.serving.grpc_target import GrpcTarget

        return GrpcTarget(spec)
    from mii.benchmark.serving.http_target import HttpTarget

    return HttpTarget(spec)
