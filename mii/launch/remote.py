"""Stands in for a process that is on another host: brings it up there through DeepSpeed's launcher.

    python -m mii.launch.remote <folder of the deployment> <role>

The other host needs mii in the same Python, and the deployment's folder (`MII_CACHE_PATH`) on a file system that both
hosts have. What the process prints comes back through the launcher into this role's log, and among it what it has to
say to the supervisor.

DeepSpeed's launcher, when it is told to end, kills every process on the other host that any of its kind has started.
So it is never told: the process over there watches a file of the deployment's folder, drains when that is removed, and
ends when it is no longer touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mii.config import MIIConfig, ReplicaConfig
from mii.errors import LauncherError
from mii.launch.folder import DeploymentFolder
from mii.launch.process import (
    CONTROL_ENV,
    PR_SET_PDEATHSIG,
    RELAY_MARK,
    RELAYED,
    Failed,
    Message,
    Process,
    Progress,
    StopWanted,
    decode_message,
)
from mii.launch.reach import check_host
from mii.launch.state import engine_role, write_private

__all__ = ["check_launcher", "launcher_command", "main", "needs_ssh", "run_there", "write_script"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_RANKS_ENV = "MII_RANKS"

_LOOK_SECONDS = 0.5
_STALE_SECONDS = 20.0  # more than file systems over a network take to show a change
_LAUNCHER_END_SECONDS = 2.5

_CONNECT_SECONDS = 10.0
_PASSED_ON = ("MII_", "HF_", "OMP_")  # launchers pass on PYTHON*, NCCL* and few others

_SCRIPT = """\
from mii.launch.remote import run_there
run_there({folder!r}, {role!r}, {run!r}, {sign!r}, {environment!r})
"""


def check_launcher(config: MIIConfig, host: str) -> None:
    """Makes sure that processes can be started on other hosts.

    Raises:
        LauncherError: a program for it is missing here.
    """
    needed = {shlex.split(config.launcher)[0]: "pip install deepspeed"}
    if needs_ssh(config):
        needed["ssh"] = "install an OpenSSH client"
        needed["pdsh"] = (
            "install it, or choose another way with launcher='deepspeed --launcher slurm' (or openmpi, ...)"
        )
    for program, remedy in needed.items():
        if shutil.which(program) is None:
            raise LauncherError(f"a replica on host {host!r} needs {program!r}, which is not installed here; {remedy}")


def needs_ssh(config: MIIConfig) -> bool:
    """Whether the launcher uses pdsh, which uses ssh."""
    words = shlex.split(config.launcher)
    return "--launcher" not in words or words[words.index("--launcher") + 1 :][:1] == ["pdsh"]


def launcher_command(config: MIIConfig, replica: ReplicaConfig, script: str, rank: int = 0) -> list[str]:
    """The command that runs a Python script once on a replica's host.

    Args:
        config: of the deployment.
        replica: where to run.
        script: path there.
        rank: whose host and device count.
    """
    hosts = ["-H", config.hostfile] if config.hostfile else []
    device, host = replica.gpu_indices[rank] if replica.gpu_indices else 0, replica.host_of(rank)
    return [
        *shlex.split(config.launcher),
        *hosts,
        *("-i", f"{host}:{device}"),
        *("--master_addr", host, "--master_port", str(replica.torch_dist_port)),
        *("--no_ssh_check", "--no_local_rank", "--force_multi"),
        script,
    ]


def write_script(process: Process, sign: Path) -> str:
    """What the launcher runs there; returns its path. `sign`: file that is touched as long as the process is wanted."""
    folder, role = process.folder, process.role
    path = folder.path / f"{role}.py"
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    environment = {**passed_on, **_place(process), CONTROL_ENV: RELAYED}
    names = {"folder": str(folder.path), "run": str(folder.run), "sign": str(sign)}
    write_private(path, _SCRIPT.format(role=role, environment=environment, **names).encode())
    return str(path)


def _place(process: Process) -> dict[str, str]:
    """What the process over there sees of its host."""
    replica, size = process.replica_config, process.config.model_conf.tensor_parallel
    seen, own = replica.seen_by(process.rank)
    ranks = sum(replica.host_of(rank) == replica.host_of(process.rank) for rank in range(size))
    if process.config.model_conf.device == "cpu" or process.role.endswith("-front"):
        devices = {_VISIBLE: ""}
    else:
        devices = {_VISIBLE: ",".join(map(str, seen))}
    return {**devices, "LOCAL_RANK": str(own), _RANKS_ENV: str(ranks)}


def run_there(folder: str, role: str, run: str, sign: str, environment: dict[str, str]) -> None:
    """On the other host: becomes the front or a rank of the engine.

    Args:
        folder: of the deployment.
        role: "replica-<i>-front" or "replica-<i>-engine[-<rank>]".
        run: where its sockets lie.
        sign: see `write_script`.
        environment: variables to set.
    """
    os.environ.update(environment)
    ranks = int(os.environ.pop(_RANKS_ENV))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:  # they share the host's cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    os.makedirs(run, mode=0o700, exist_ok=True)
    threading.Thread(target=_watch, args=(Path(sign),), daemon=True).start()
    sys.argv = [sys.argv[0], folder, role]
    module = "mii.launch.front" if role.endswith("-front") else "mii.launch.engine"
    try:
        importlib.import_module(module).main()
    finally:
        _clear(Path(run), role)


def _clear(run: Path, role: str) -> None:
    """The last process of a replica takes the folder for sockets away, which may be this host's alone."""
    if role.endswith("-engine"):
        for file in run.glob(f"{role.removesuffix('engine')}*"):  # what its ranks have met by
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others are still there
        run.rmdir()


def main() -> None:
    """Entry point; see the module."""
    with Process.from_arguments() as process:
        replica, is_front = process.replica_config, process.role.endswith("-front")
        host = replica.host_of(process.rank)
        process.report(f"starting on {host}")
        sign, is_first = _new_sign(process.folder, process.role)
        if process.role == engine_role(process.replica):
            process.folder.meeting_file(process.replica).unlink(missing_ok=True)  # the others wait for the new one
        if needs_ssh(process.config):
            ports = replica.tensor_parallel_ports[:1] if is_front else []
            _reach(host, process.folder, ports, 0.0 if is_first else process.drain_seconds + _STALE_SECONDS)
        command = launcher_command(process.config, replica, write_script(process, sign), process.rank)
        there = _There(process, command, host)
        while not there.ready.wait(_LOOK_SECONDS):
            there.check()
            sign.touch()
        if is_front:
            _check_open(replica)
        process.ready(**there.ports)
        while not process.wait_stop(_LOOK_SECONDS):
            there.check()
            sign.touch()
        sign.unlink()
        there.wait(process.drain_seconds + _LAUNCHER_END_SECONDS)


def _reach(host: str, folder: DeploymentFolder, ports: Sequence[int], seconds: float) -> None:
    """Makes sure that the process can run there; one that was there before it may take so long to end."""
    deadline = time.monotonic() + seconds
    while taken := check_host(host, str(folder.path), ports):
        if time.monotonic() >= deadline:
            raise LauncherError(f"port {taken[0]} is taken on host {host!r}; choose another port_number")
        time.sleep(_LOOK_SECONDS)


class _There:
    """The process on the other host, as its launcher and what it prints tell.

    Args:
        process: this one, which hands on what is said there.
        command: the launcher's.
        host: the other host.
    """

    def __init__(self, process: Process, command: list[str], host: str) -> None:
        self.ready = threading.Event()
        self.ports: dict[str, int] = {}
        """That it listens on, once it is ready."""
        self._process, self._host, self._failure = process, host, ""
        self._launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="mii-relay", daemon=True)
        self._reader.start()

    def check(self) -> None:
        """Makes sure that it runs.

        Raises:
            LauncherError: it has ended.
        """
        if self._launcher.poll() is None:
            return
        self._reader.join(_LOOK_SECONDS)
        if self._failure:
            raise LauncherError(f"on host {self._host!r}: {self._failure}")
        raise LauncherError(f"the launcher of host {self._host!r} ended with exit code {self._launcher.returncode}")

    def wait(self, seconds: float) -> None:
        """Until it has ended, or for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(seconds)

    def _read(self) -> None:
        assert self._launcher.stdout is not None
        for line in self._launcher.stdout:
            before, mark, said = line.decode("utf-8", "replace").partition(RELAY_MARK)
            if not mark:
                print(before, end="", flush=True)
                continue
            with contextlib.suppress(msgspec.DecodeError):
                self._hear(decode_message(said.encode()))

    def _hear(self, message: Message) -> None:
        if isinstance(message, Progress):
            self._process.report(message.stage, message.done, message.total, message.unit)
        elif isinstance(message, Failed):
            self._failure = message.reason
        elif isinstance(message, StopWanted):
            self._process.stop_deployment(message.reason)
        else:
            self.ports = message.ports
            self.ready.set()


def _check_open(replica: ReplicaConfig) -> None:
    host, _, port = replica.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise LauncherError(
            f"a replica listens on port {port} of host {host!r}, which cannot be reached from here: {error}; let "
            "connections from this host through there"
        ) from error


def _new_sign(folder: DeploymentFolder, role: str) -> tuple[Path, bool]:
    """Takes away that of a stand-in which was killed, so that its process over there ends; whether there was none."""
    old = list(folder.path.glob(f"{role}.*.alive"))
    for sign in old:
        sign.unlink(missing_ok=True)
    sign = folder.path / f"{role}.{os.getpid()}.alive"
    sign.touch(mode=0o600)
    return sign, not old


def _watch(sign: Path) -> None:
    """Ends this process when the sign of life is gone or old. Its age is told by this host's own clock."""
    last, since = 0, time.monotonic()
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            touched = sign.stat().st_mtime_ns
        except FileNotFoundError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if touched != last:
            last, since = touched, time.monotonic()
        elif time.monotonic() - since > _STALE_SECONDS:
            os.kill(os.getpid(), signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    main()
