"""What every process of a deployment does alike: it tells the supervisor how far it is, drains when it is told to stop,
and dies with its supervisor.

A process is started as ``python -m mii.launch.<what> <folder> <role>``. Its standard output and error are its log. What
it has to say goes to the supervisor as lines of JSON through a pipe; without one (started by hand) into its log.

    def main() -> None:
        with Process.from_arguments() as process:              # an exception that leaves the block is what failed
            process.report("loading weights", done=1e8, total=3e8, unit="B")
            ...
            process.ready(grpc=50051)                          # from here on SIGTERM asks to drain; before, it kills
            process.wait_stop()                                # or: await process.stopping(); or poll process.stop_fd
            ...                                                # finish what runs within process.drain_seconds, return

gRPC servers must set the option ``("grpc.so_reuseport", 0)``: otherwise two processes share a port without an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import re
import select
import signal
import sys
import time
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from mii.launch.folder import DeploymentFolder
from mii.logging import logger

if TYPE_CHECKING:
    from mii.config import MIIConfig, ModelConfig, ReplicaConfig

__all__ = [
    "CONTROL_ENV",
    "RELAYED",
    "RELAY_MARK",
    "Failed",
    "Message",
    "Process",
    "Progress",
    "Ready",
    "StopWanted",
    "decode_message",
]

# "<pid of the supervisor>:<file descriptor to write to>", or RELAYED
CONTROL_ENV = "MII_SUPERVISOR"
# On another host: lines go to standard output behind a mark, and whoever reads that hands them on.
RELAYED, RELAY_MARK = "relayed", "mii-says "
_LONGEST_TEXT = 900  # characters; a line stays under PIPE_BUF (4096 bytes), so threads cannot mix theirs
_REPORT_SECONDS = 0.05
_CPU_MEMORY_FRACTION = 0.8  # of what is free, for all replicas together
PR_SET_PDEATHSIG = 1
_ROLE = re.compile(r"replica-(\d+)-(?:front|engine(?:-(\d+))?)")


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """How far a process is while it starts. `total` 0: not known. `unit`: "B" for bytes, else a word or nothing.
    `waits`: its own part is done, and it sleeps until others are there.
    """

    stage: str
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    waits: bool = False


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """A process can do its work. `ports`: those that it listens on, by what they speak."""

    ports: dict[str, int] = {}


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A process gives up, and why, in one sentence. `port_taken`: somebody else has its port."""

    reason: str
    port_taken: bool = False


class StopWanted(msgspec.Struct, tag="stop", frozen=True):
    """Somebody who may asks for the whole deployment to end."""

    reason: str = ""


Message = Progress | Ready | Failed | StopWanted
_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def decode_message(line: bytes) -> Message:
    """One line of the pipe.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(line)


class Process:
    """This process, as part of a deployment. Use it as a context manager around everything that the process does.

    Args:
        folder: of the deployment.
        role: "balancer", "gateway", "replica-<i>-front", "replica-<i>-engine" (rank 0) or "replica-<i>-engine-<rank>".
    """

    def __init__(self, folder: str | os.PathLike[str], role: str) -> None:
        self.folder = DeploymentFolder(Path(folder))
        self.role = role
        match = _ROLE.fullmatch(role)
        self.replica = int(match[1]) if match else 0
        self.rank = int(match[2] or 0) if match else 0
        self.stop_fd, self._stop_write_fd = os.pipe()
        """Readable from the moment that a stop is requested: for a poll or an event loop. Never read from it."""
        os.set_blocking(self._stop_write_fd, False)
        self._control_fd, self._mark = _bind_to_supervisor()
        self._stage, self._reported_at = "", 0.0

    @classmethod
    def from_arguments(cls, arguments: list[str] | None = None) -> Process:
        """From ``sys.argv``: the folder and the role.

        Raises:
            SystemExit: there are not two arguments.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        if len(arguments) != 2:
            raise SystemExit(f"usage: python -m mii.launch.<what> FOLDER ROLE; got {arguments}")
        return cls(*arguments)

    @cached_property
    def config(self) -> MIIConfig:
        """The deployment's config, with the ports that were chosen and a ReplicaConfig for each replica."""
        from mii.config import MIIConfig

        return MIIConfig.model_validate_json(self.folder.config_file.read_bytes())

    @property
    def replica_config(self) -> ReplicaConfig:
        """Host, ports and devices of this process's replica."""
        return self.config.model_conf.replica_configs[self.replica]

    @property
    def model_config(self) -> ModelConfig:
        """The model's config as this process loads it.

        It sees no devices but its own, so they count from 0. Replicas that share this machine's memory share what
        `memory_fraction` allows.
        """
        from mii.config import DEVICE_MAP_DEFAULT

        model = self.config.model_conf
        changes: dict[str, object] = {"device_map": DEVICE_MAP_DEFAULT, "progress": True}
        mine = self.replica_config
        here, ranks = mine.host_of(self.rank), range(model.tensor_parallel)
        sharing = sum(any(_is_same(replica.host_of(rank), here) for rank in ranks) for replica in model.replica_configs)
        if sharing > 1 and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            whole = model.memory_fraction if "memory_fraction" in model.model_fields_set else _CPU_MEMORY_FRACTION
            changes["memory_fraction"] = whole / sharing
        return model.model_copy(update=changes)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the supervisor is on another host."""
        return bool(self._mark)

    @property
    def listen_host(self) -> str:
        """The address that a front listens on: this machine's own unless the load balancer is on another one."""
        if self.config.replica_only:
            return self.config.host
        return "127.0.0.1" if self.replica_config.is_local and not self.is_elsewhere else "0.0.0.0"

    @cached_property
    def token(self) -> str:
        """The deployment's secret (see `DeploymentFolder.read_token`)."""
        return self.folder.read_token()

    @property
    def engine_address(self) -> str:
        """``ipc://`` address between the front and the engine of this process's replica."""
        return self.folder.engine_address(self.replica)

    @property
    def drain_seconds(self) -> float:
        """How long what runs may still take once a stop is requested; soon after that the process is killed."""
        return self.config.drain_seconds

    def report(self, stage: str, done: float = 0.0, total: float = 0.0, unit: str = "") -> None:
        """Shows how far the start is. Cheap enough for inner loops: at most 20 lines a second of one stage are sent."""
        now = time.monotonic()
        if stage == self._stage and done < total and now < self._reported_at + _REPORT_SECONDS:
            return
        self._stage, self._reported_at = stage, now
        self._send(Progress(stage, done, total, unit))

    def waiting(self, stage: str) -> None:
        """Shows that its own part of the start is done: from here on it sleeps until others are there."""
        self._send(Progress(stage, waits=True))

    def ready(self, **ports: int) -> None:
        """Says that the process can work now, and turns SIGTERM into a request to drain. For the main thread only."""
        # The handler's part in C writes to the pipe at once. Its part in Python runs when the interpreter does, which a
        # call that is about to sleep would put off for ever.
        signal.set_wakeup_fd(self._stop_write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._send(Ready(ports))

    def failed(self, reason: str, port_taken: bool = False) -> None:
        """Says why the process is about to end; call it once, then leave."""
        logger.error("%s failed: %s", self.role, reason)
        self._send(Failed(reason[:_LONGEST_TEXT], port_taken))

    def stop_deployment(self, reason: str = "") -> None:
        """Asks the supervisor to drain and end the whole deployment (the balancer's Terminate); returns at once."""
        self._send(StopWanted(reason[:_LONGEST_TEXT]))

    def request_stop(self) -> None:
        """What SIGTERM does once the process is ready."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it is readable already
            os.write(self._stop_write_fd, b"x")

    @property
    def stop_requested(self) -> bool:
        """Whether a stop is requested; costs a system call."""
        return self.wait_stop(0)

    def wait_stop(self, timeout: float | None = None) -> bool:
        """Sleeps until a stop is requested. Returns whether one is. `timeout`: seconds."""
        return bool(select.select([self.stop_fd], [], [], timeout)[0])

    async def stopping(self) -> None:
        """Sleeps until a stop is requested, in the running event loop; for one waiter at a time."""
        loop = asyncio.get_running_loop()
        requested = loop.create_future()
        loop.add_reader(self.stop_fd, _resolve, requested)
        try:
            await requested
        finally:
            loop.remove_reader(self.stop_fd)

    def __enter__(self) -> Process:
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started the deployment
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """An error is reported with its message; the traceback is printed by the interpreter, into the log."""
        if isinstance(error, Exception):
            from mii.errors import PortTakenError

            self.failed(_sentence(error), isinstance(error, PortTakenError))

    def _send(self, message: Message) -> None:
        if self._control_fd is None:
            logger.info("%s: %s", self.role, message)
            return
        with contextlib.suppress(OSError):  # the supervisor is gone, and so is this process in a moment
            os.write(self._control_fd, self._mark + _encode(message) + b"\n")


def _is_same(host: str, other: str) -> bool:
    from mii.config.model import is_this_host

    return host == other or (is_this_host(host) and is_this_host(other))


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _sentence(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from mii.validation import explain

        return explain(error)
    from mii.errors import MIIError

    text = str(error) or "no message"
    return text if isinstance(error, MIIError) else f"{type(error).__name__}: {text}"


def _bind_to_supervisor() -> tuple[int | None, bytes]:
    """Makes the kernel kill this process when its supervisor dies. Returns the file descriptor to report to, and what
    each line begins with.
    """
    control = os.environ.pop(CONTROL_ENV, None)
    if control is None:
        return None, b""
    if control == RELAYED:
        return os.dup(sys.stdout.fileno()), RELAY_MARK.encode()
    parent, descriptor = (int(part) for part in control.split(":"))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    os.set_inheritable(descriptor, False)
    return descriptor, b""
