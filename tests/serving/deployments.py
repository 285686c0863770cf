"""What tests of deployments share: stand-ins for the processes, and the proof that nothing of a deployment is left."""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mii.backend import deployment
from mii.backend.ports import is_free
from mii.config import MIIConfig
from mii.config.registry import deployment_folder
from mii.launch.folder import DeploymentFolder
from mii.launch.state import BALANCER, Plan, Spec, engine_role, front_role, read_state
from tests.serving.idle_process import Behaviour

STAND_IN = Path(__file__).with_name("idle_process.py")
# What is bound to happen may take long where other tests have the cores; what never happens is found out all the same.
PATIENCE_SECONDS = 60.0


def processes_of(folder: Path) -> dict[int, str]:
    """Every process of this machine that has `folder` in its command line, zombies left out."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in command and int(process.name) != os.getpid():
            found[int(process.name)] = command
    return found


def shared_memory() -> set[str]:
    """What lies there."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def without_owner(names: set[str]) -> set[str]:
    """Of some shared memory, what no process that lives has mapped."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped += maps.read_text()
    return {name for name in names if f"/dev/shm/{name}" not in mapped}


def wait_until(
    condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS, *, seen: Callable[[], object] = lambda: ""
) -> None:
    """Fails when it does not become true in this time, and tells what is `seen` then."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not happen within {seconds:g} s {seen()}".rstrip())
        time.sleep(0.01)


@contextmanager
def nothing_left(cache: Path, temporary: Path) -> Iterator[None]:
    """Asserts that what a test starts under `cache` is gone: processes, files, sockets, zombies.

    Args:
        cache: what MII_CACHE_PATH says.
        temporary: what TMPDIR says.
    """
    before = set(zombies())
    try:
        yield
        left = {path for path in cache.rglob("*") if not path.is_dir()}
        assert left == set(), left
        processes = processes_of(cache)
        assert processes == {}, processes
    finally:
        for pid in processes_of(cache):
            os.kill(pid, 9)
    # torch makes a folder there when its compiler is imported, which nobody here asks for
    kept = [str(path) for path in temporary.rglob("*") if not path.name.startswith("torchinductor_")]
    assert kept == [], kept
    wait_until(lambda: set(zombies()) <= before, seen=lambda: f"zombies: {set(zombies()) - before}")


def zombies() -> list[int]:
    """Children of this process that have ended and that nobody has waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


_PORTS_OF_A_WORKER = 500
_taken: Iterator[int] = itertools.count()


def free_port(count: int = 8) -> int:
    """The first of some free ports in a row, others at each call. They are this process's own: workers of a test run,
    and test runs, share a machine; no connection gets one of these for its own end, as it may a port that was bound to
    0 for a moment; and all lie below mii's default ports, from 25555 on, which other workers' deployments may take.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    start = 11000 + (run % 7 * 4 + worker) * _PORTS_OF_A_WORKER
    for _ in range(_PORTS_OF_A_WORKER):
        ports = [start + next(_taken) % _PORTS_OF_A_WORKER for _ in range(count)]
        if ports[-1] == ports[0] + count - 1 and all(is_free(port, "0.0.0.0") for port in ports):
            return ports[0]
    raise AssertionError("no free ports")


class StandIns:
    """Puts stand-ins in the place of the processes that a deployment would start.

    Args:
        monkeypatch: undoes it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(deployment, "make_plan", self._plan)

    def __call__(self, role: str, **behaviour: object) -> None:
        """Says how the stand-in of a role behaves."""
        self.behaviours[role] = msgspec.convert(behaviour, Behaviour)

    def _plan(self, config: MIIConfig, folder: DeploymentFolder, *, attached: bool = False) -> Plan:
        roles: list[tuple[str, int | None]] = [(BALANCER, None)]
        for index in range(config.model_conf.replica_num):
            roles += [(front_role(index), index), (engine_role(index), index)]
        if config.enable_restful_api:
            roles.append(("gateway", None))
        ports = {BALANCER: config.port_number}
        specs = [Spec(role, self._command(folder, role, ports.get(role, 0)), replica=index) for role, index in roles]
        drain, restarts, start = config.drain_seconds, config.max_restarts, config.start_seconds
        return Plan(config.deployment_name, specs, drain, restarts, start, attached)

    def _command(self, folder: DeploymentFolder, role: str, port: int) -> list[str]:
        behaviour = msgspec.structs.replace(self.behaviours.get(role, Behaviour()), port=port)
        return [sys.executable, str(STAND_IN), str(folder.path), role, msgspec.json.encode(behaviour).decode()]


def pid_of(folder: DeploymentFolder, role: str) -> int | None:
    """The process of a role, as state.json has it."""
    state = read_state(folder.state_file)
    return next((process.pid for process in state.processes if process.role == role), None) if state else None


def config(name: str = "demo", **options: Any) -> MIIConfig:
    model = {"model_name_or_path": "m", "progress": False, "device": "cpu", **options.pop("model", {})}
    return MIIConfig(deployment_name=name, model_config=model, **{"port_number": free_port(), **options})


def fork(work: Callable[[], object]) -> int:
    """A copy of this process that does some work and ends with 0, or 1 when that fails."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return pid


def ended_with(pid: int) -> int:
    """Waits for it; its exit code, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def log_of(name: str, role: str) -> str:
    return deployment_folder(name).log(role).read_text()
