"""One replica for tests: the real front process over a stand-in engine or a real one, supervised by the test."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf.empty_pb2 import Empty

from mii.config import MIIConfig
from mii.grpc_related.options import CHANNEL_OPTIONS
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from mii.launch.child import Child
from mii.launch.folder import DeploymentFolder
from mii.launch.process import Message
from mii.launch.state import Spec, engine_role, front_role
from tests.serving.deployments import PATIENCE_SECONDS, free_port, wait_until
from tests.serving.standin import Options

__all__ = ["Replica", "running_replica"]

STAND_IN, ENGINE = "tests.serving.standin", "mii.launch.engine"


class Replica:
    """The two processes of a replica, and a channel to it.

    Args:
        folder: for the deployment's files.
        model: folder or file of the model, or of the tokenizer alone.
        engine: module of the engine process.
        options: of the stand-in.
        model_options: of the model's config.
        config: of the deployment.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        engine: str = STAND_IN,
        options: Options | None = None,
        model_options: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.folder = DeploymentFolder(folder)
        self.folder.create()
        self.port = free_port(2) + 1  # the load balancer's would be the one before
        self.said: list[tuple[str, Message]] = []
        """What the processes told their supervisor."""
        model_config = {"model_name_or_path": str(model), "device": "cpu", **(model_options or {})}
        deployment = MIIConfig(deployment_name="demo", model_config=model_config, port_number=self.port - 1, **config)
        deployment.generate_replica_configs()
        self.folder.config_file.write_text(deployment.model_dump_json(by_alias=True))
        (folder / "standin-0.json").write_bytes(msgspec.json.encode(options or Options()))
        self.engine = self._child(engine, engine_role(0))
        self.front = self._child("mii.launch.front", front_role(0))
        self.address = f"127.0.0.1:{self.port}"
        self.channel = grpc.insecure_channel(self.address, CHANNEL_OPTIONS)
        self.stub = ModelResponseStub(self.channel)

    def _child(self, module: str, role: str) -> Child:
        command = [sys.executable, "-m", module, str(self.folder.path), role]
        return Child(Spec(role, command, {"PYTHONPATH": str(Path(__file__).parents[2])}), self.folder, 0)

    def start(self) -> None:
        """Returns when both are ready."""
        self.front.start()
        self.engine.start()
        self.wait_ready()

    def start_engine(self) -> None:
        """Again, after it has ended."""
        self.wait_ended(self.engine)
        self.engine.start()
        wait_until(lambda: self.health().ready)

    def wait_ready(self) -> None:
        wait_until(lambda: self.listen() and self.engine.ready and self.front.ready)

    def wait_ended(self, child: Child) -> None:
        def gone() -> bool:
            self._hear(child)
            return child.ended() or not child.running

        wait_until(gone)

    def listen(self) -> bool:
        """Takes in what the processes said; fails when one has ended."""
        for child in (self.engine, self.front):
            self._hear(child)
            assert not child.ended(), f"{child.spec.role} {child.state.last_end}\n{child.log_tail()}"
        return True

    def _hear(self, child: Child) -> None:
        if child.pipe is not None and select.select([child.pipe], [], [], 0)[0]:
            self.said += [(child.spec.role, message) for message in child.read()]

    def health(self) -> Any:
        """The replica's answer, or one that says that there is none."""
        return self.stub.Health(Empty(), timeout=10, wait_for_ready=True)

    def stats(self) -> dict[str, Any]:
        """What the replica counts."""
        numbers: dict[str, Any] = json.loads(self.stub.Stats(Empty(), timeout=10).json)
        return numbers

    def wait_idle(self, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Returns the counts once nothing of any request is left, in the front and in the engine."""

        def idle() -> bool:
            counts = self.stats()
            engine = counts["engine"]
            left = (counts["outstanding"], engine["running"], engine["waiting"])
            return left == (0, 0, 0) and engine["free_blocks"] == engine["num_blocks"]

        wait_until(idle, seconds, seen=self.stats)
        return self.stats()

    def stop(self) -> None:
        """Ends both, whatever state they are in."""
        self.channel.close()
        for child in (self.front, self.engine):
            if child.running and not child.ended():
                child.signal(signal.SIGCONT)
                child.signal(signal.SIGKILL)
                self.wait_ended(child)


@contextlib.contextmanager
def running_replica(folder: Path, model: Path, **options: Any) -> Iterator[Replica]:
    """A replica that is ready, and is gone afterwards."""
    replica = Replica(folder, model, **options)
    try:
        replica.start()
        yield replica
    finally:
        replica.stop()
