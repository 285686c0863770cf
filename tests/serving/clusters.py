"""Deployments with every process real but the engines, which are stand-ins (`tests.serving.standin`)."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mii.backend import MIIClient, MIIServer, deployment, scaling
from mii.backend.plan import make_plan
from mii.config import MIIConfig
from mii.config.registry import deployment_folder
from mii.launch.folder import DeploymentFolder
from mii.launch.state import BALANCER, Machine, Plan, engine_role, front_role, read_state
from tests.serving.deployments import free_port, nothing_left, wait_until
from tests.serving.standin import Options

__all__ = ["NAME", "Cluster", "running_cluster", "shared_cluster"]

NAME = "cluster"
_ENGINE, _STAND_IN = "mii.launch.engine", "tests.serving.standin"


class Cluster:
    """A deployment that runs.

    Args:
        server: its server.
    """

    def __init__(self, server: MIIServer) -> None:
        self.config = server.mii_config
        self.client = MIIClient(self.config)
        self.address = self.client.address

    def role(self, name: str) -> Any:
        """What state.json says of a process."""
        state = read_state(deployment_folder(NAME).state_file)
        return next(process for process in state.processes if process.role == name) if state else None

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to a process; returns its number."""
        pid = int(self.role(role).pid)
        os.kill(pid, number)
        return pid

    def wait_back(self, role: str, killed: int) -> None:
        """Until a process that was killed has come up again."""
        wait_until(lambda: self.role(role).stage == "ready" and self.role(role).pid not in (None, killed))

    def log(self, role: str) -> str:
        return deployment_folder(NAME).log(role).read_text()

    def wait_idle(self) -> dict[str, Any]:
        """The counts once nothing of any call is left in the balancer, the fronts and the engines."""

        def idle() -> bool:
            self.client.health()  # makes the engines' counts fresh
            counts = self.client.stats()
            if counts["balancer"]["replicas_ready"] < len(counts["replicas"]):
                return False
            engines = [replica["engine"] for replica in counts["replicas"]]
            left = [counts["balancer"]["outstanding"], counts["balancer"]["held_calls"]]
            left += [replica["outstanding"] for replica in counts["replicas"]]
            left += [engine[name] for engine in engines for name in ("running", "waiting")]
            return not any(left) and all(engine["free_blocks"] == engine["num_blocks"] for engine in engines)

        wait_until(idle, seen=self.client.stats)
        return self.client.stats()

    def prompts_of(self, replica: int) -> int:
        """How many prompts a replica has ended, however they ended."""
        return sum(self.client.stats()["replicas"][replica]["finished"].values())

    balancer, engine, front = BALANCER, staticmethod(engine_role), staticmethod(front_role)


@contextlib.contextmanager
def running_cluster(
    monkeypatch: pytest.MonkeyPatch, model: Path, *, replicas: int = 2, options: Options | None = None, **config: Any
) -> Iterator[Cluster]:
    """A deployment that is ready, and is gone afterwards. MII_CACHE_PATH says where its files lie."""

    def plan(
        config: MIIConfig, folder: DeploymentFolder, *, attached: bool = False, machine: Machine | None = None
    ) -> Plan:
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for index in range(config.model_conf.replica_num):
            (folder.path / f"standin-{index}.json").write_bytes(msgspec.json.encode(options or Options()))
        made = make_plan(config, folder, attached=attached, machine=machine)
        swapped = [
            msgspec.structs.replace(
                process, command=[_STAND_IN if part == _ENGINE else part for part in process.command]
            )
            for process in made.processes
        ]
        return msgspec.structs.replace(made, processes=swapped)

    monkeypatch.setattr(deployment, "make_plan", plan)
    monkeypatch.setattr(scaling, "make_plan", plan)
    model_config = {"model_name_or_path": str(model), "device": "cpu", "replica_num": replicas, "progress": False}
    server = MIIServer(
        MIIConfig(deployment_name=NAME, model_config=model_config, port_number=free_port(replicas + 8), **config)
    )
    try:
        cluster = Cluster(server)
        yield cluster
        cluster.client.close()
    finally:
        server.terminate(hurry=True)


@contextlib.contextmanager
def shared_cluster(factory: pytest.TempPathFactory, model: Path, **options: Any) -> Iterator[Cluster]:
    """A deployment for all tests of a module, with a registry of its own; when it is gone, nothing is left."""
    cache = factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setenv("MII_CACHE_PATH", str(cache))
        monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up anew
        monkeypatch.setenv("TMPDIR", temporary)
        with nothing_left(cache, Path(temporary)), running_cluster(monkeypatch, model, **options) as cluster:
            cluster.wait_idle()  # a load balancer answers before the last replica does
            yield cluster
