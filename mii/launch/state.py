"""What the supervisor reads and writes: the plan of a deployment, its state, and what it tells whoever started it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mii.launch.process import Message

__all__ = [
    "BALANCER",
    "GATEWAY",
    "SUPERVISOR",
    "Accepted",
    "Event",
    "EventReader",
    "Failure",
    "Machine",
    "Notice",
    "Part",
    "Plan",
    "ProcessState",
    "Refused",
    "Running",
    "Scale",
    "Scaled",
    "Spec",
    "State",
    "engine_role",
    "front_role",
    "read_plan",
    "read_state",
    "start_ticks",
    "write_private",
]

SUPERVISOR, BALANCER, GATEWAY = "supervisor", "balancer", "gateway"
_CHUNK = 65536


def front_role(replica: int) -> str:
    return f"replica-{replica}-front"


def engine_role(replica: int, rank: int = 0) -> str:
    return f"replica-{replica}-engine-{rank}" if rank else f"replica-{replica}-engine"


class Spec(msgspec.Struct, frozen=True):
    """One process to start.

    Args:
        role: its name; see `mii.launch.process.Process`.
        command: program and arguments.
        environment: variables on top of the supervisor's own; None takes one away.
        cpus: cores that it may run on; empty: all.
        replica: the replica that it belongs to; None: to all of them.
        group: processes of one group (an engine's ranks) start anew together when one of them dies; empty: alone.
    """

    role: str
    command: list[str]
    environment: dict[str, str | None] = {}
    cpus: list[int] = []
    replica: int | None = None
    group: str = ""


class Machine(msgspec.Struct, frozen=True):
    """What whoever started a deployment saw of the machine; replicas that are added later are to see the same.

    Args:
        python: the program that runs Python.
        version: of mii.
        visible: CUDA_VISIBLE_DEVICES; None: it was not set.
        cores: that processes may run on.
        threads: whether OMP_NUM_THREADS is set.
    """

    python: str
    version: str
    visible: str | None
    cores: list[int]
    threads: bool


class Plan(msgspec.Struct, frozen=True):
    """What a supervisor does.

    Args:
        name: of the deployment.
        processes: what it starts.
        drain_seconds: see `mii.config.MIIConfig`.
        max_restarts: see `mii.config.MIIConfig`.
        start_seconds: see `mii.config.MIIConfig`.
        attached: the deployment ends when whoever started it does.
        machine: what it was made for; None: replicas cannot be added.
    """

    name: str
    processes: list[Spec]
    drain_seconds: float
    max_restarts: int
    start_seconds: float | None = None
    attached: bool = False
    machine: Machine | None = None


class ProcessState(msgspec.Struct):
    """One process, as `state.json` has it.

    Args:
        role: its name.
        pid: None while it does not run.
        start_ticks: when it was started, in the kernel's units; tells it from a later process with the same number.
        stage: "starting", "ready", "waiting" (to be started again), "given up", "leaving" (its replica is being taken
            away) or "ended".
        restarts: how often it was started again in all.
        ports: what it listens on.
        last_end: how it ended the last time; empty: it never did.
    """

    role: str
    pid: int | None = None
    start_ticks: int = 0
    stage: str = "starting"
    restarts: int = 0
    ports: dict[str, int] = {}
    last_end: str = ""


class State(msgspec.Struct):
    """A deployment, as `state.json` has it.

    Args:
        pid: of the supervisor.
        stage: "starting", "running", "stopping" or "failed".
        started_at: seconds since 1970.
        ready_at: seconds since 1970; None: it is not ready yet.
        reason: why it failed.
        processes: its parts.
    """

    pid: int
    stage: str = "starting"
    started_at: float = 0.0
    ready_at: float | None = None
    reason: str = ""
    processes: list[ProcessState] = []


class Part(msgspec.Struct, tag="part", frozen=True):
    """A process has said something."""

    role: str
    message: Message


class Running(msgspec.Struct, tag="running", frozen=True):
    """Every process is ready."""


class Failure(msgspec.Struct, tag="failure", frozen=True):
    """The deployment has failed and is gone: which part, why, and the end of that part's log.

    `port_taken`: somebody took a port between its choice and its use.
    """

    role: str
    reason: str
    log: str = ""
    port_taken: bool = False


class Notice(msgspec.Struct, tag="notice", frozen=True):
    """Something that whoever watches the deployment wants to know."""

    text: str


class Scale(msgspec.Struct, tag="scale", frozen=True):
    """A request for other replicas.

    Args:
        plan: of the deployment with them.
        config: ``deployment.json`` with them.
    """

    plan: Plan
    config: str


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    """A `Scale` has begun: its ports are in the registry."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """A `Scale` is not done, and why."""

    reason: str


class Scaled(msgspec.Struct, tag="scaled", frozen=True):
    """A `Scale` is done."""


Event = Part | Running | Failure | Notice | Accepted | Refused | Scaled


class EventReader:
    """What a supervisor tells whoever listens.

    Args:
        connection: the socket to it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._received = connection, b""

    def next(self) -> Event | None:
        """The next event, once there is one; None: the supervisor has hung up.

        Raises:
            OSError: the socket's; the next call goes on where this one was.
        """
        while b"\n" not in self._received:
            chunk = self._connection.recv(_CHUNK)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return msgspec.json.decode(line, type=Event)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event


def read_plan(file: Path) -> Plan:
    """What `plan.json` says."""
    return msgspec.json.decode(file.read_bytes(), type=Plan)


def read_state(file: Path) -> State | None:
    """What `state.json` says; None where there is none or it is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return None


def write_private(file: Path, content: bytes) -> None:
    """Puts a file in place in one step, readable by its owner only."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
        handle.write(content)
    os.replace(temporary, file)


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 where there is no such process or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
