"""A load balancer over replicas that follow a script, as several files of tests have it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.grpc_related.statuses import KIND
from tests.serving.deployments import PATIENCE_SECONDS, wait_until
from tests.serving.scripted import Balancer, Scripted, balancing, echo, ends_with, scripted

__all__ = ["LOST", "METHODS", "QUEUE", "Held", "Setup", "alone", "both", "two_replicas"]

QUEUE = 20
LOST = ends_with(grpc.StatusCode.UNAVAILABLE, (KIND, "ServerUnavailableError"))
METHODS = ("GeneratorReply", "GeneratorReplyStream")


class Setup:
    """A load balancer over two scripted replicas, and a stub to it."""

    def __init__(self, replicas: list[Scripted], balancer: Balancer) -> None:
        self.replicas, self.balancer = replicas, balancer
        self.channel = grpc.insecure_channel(balancer.address, CHANNEL_OPTIONS)
        self.stub = ModelResponseStub(self.channel)

    def ask(
        self, prompts: list[Any], method: str = "GeneratorReply", timeout: float = PATIENCE_SECONDS, **options: Any
    ) -> list[str]:
        """The texts of a call's answers."""
        request = pack_request(prompts, options)
        texts = [""] * len(prompts)
        if method == "GeneratorReply":
            replies = [self.stub.GeneratorReply(request, timeout=timeout)]
            assert [answer.index for answer in replies[0].response] == list(range(len(prompts)))
        else:
            replies = self.stub.GeneratorReplyStream(request, timeout=timeout)
        for reply in replies:
            for answer in reply.response:
                texts[answer.index] += answer.error or answer.response
        return texts

    def error(self, prompts: list[Any], method: str = "GeneratorReply", timeout: float = PATIENCE_SECONDS) -> Any:
        """How a call fails."""
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(prompts, method, timeout)
        return caught.value

    @property
    def calls(self) -> list[int]:
        return [replica.calls for replica in self.replicas]

    def stats(self) -> Any:
        return json.loads(self.stub.Stats(Empty()).json)

    def wait_ready(self, count: int = 2) -> None:
        wait_until(lambda: self.stats()["balancer"]["replicas_ready"] == count)


@contextmanager
def two_replicas() -> Iterator[Setup]:
    """A load balancer over two scripted replicas; when the block ends, nothing of any call may be left."""
    replicas = [Scripted(), Scripted()]
    with ExitStack() as stack:
        ports = [stack.enter_context(scripted(replica)) for replica in replicas]
        balancer = stack.enter_context(balancing([f"127.0.0.1:{port}" for port in ports], QUEUE))
        setup = Setup(replicas, balancer)
        setup.wait_ready()
        yield setup
        wait_until(lambda: setup.stats()["balancer"]["outstanding"] == 0)
        setup.channel.close()


@contextmanager
def alone(script: Any) -> Iterator[Setup]:
    """A load balancer over one replica, which the test ends itself."""
    replica = Scripted()
    replica.script = script
    with scripted(replica) as port, balancing([f"127.0.0.1:{port}"]) as balancer:
        setup = Setup([replica], balancer)
        setup.wait_ready(1)
        yield setup
        setup.channel.close()


class Held:
    """A script that waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, request: Any, context: Any, call: int) -> Iterator[Any]:
        context.add_callback(self.go.set)  # when the call is over
        assert self.go.wait(PATIENCE_SECONDS)
        yield from echo(request, context, call)


def both(setup: Setup, script: Any) -> None:
    for replica in setup.replicas:
        replica.script = script
