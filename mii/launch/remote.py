"""Stands in for a process of a replica on another host: brings it up there through DeepSpeed's launcher.

    python -m mii.launch.remote <folder of the deployment> <role>

The other host needs mii in the same Python, and the deployment's folder (`MII_CACHE_PATH`) on a file system that both
hosts have. What the process prints comes back through the launcher into this role's log. It counts as ready when the
front's port is open, which it is once the engine is ready.

DeepSpeed's launcher, when it is told to end, kills every process on the other host that any of its kind has started.
So it is never told: the process over there watches a file of the deployment's folder, drains when that is removed, and
ends when it is no longer touched.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from mii.config import MIIConfig, ReplicaConfig
from mii.errors import LauncherError
from mii.launch.folder import DeploymentFolder
from mii.launch.process import PR_SET_PDEATHSIG, Process

__all__ = ["check_launcher", "launcher_command", "main", "run_there", "write_script"]

_LOOK_SECONDS = 0.5
_STALE_SECONDS = 20.0  # more than file systems over a network take to show a change
_LAUNCHER_END_SECONDS = 2.5

_SCRIPT = """\
from mii.launch.remote import run_there
run_there({folder!r}, {role!r}, {run!r}, {sign!r})
"""


def check_launcher(config: MIIConfig, host: str) -> None:
    """Makes sure that processes can be started on other hosts.

    Raises:
        LauncherError: a program for it is missing here.
    """
    words = shlex.split(config.launcher)
    needed = {words[0]: "pip install deepspeed", "ssh": "install an OpenSSH client"}
    if "--launcher" not in words:
        needed["pdsh"] = (
            "install it, or choose another way with launcher='deepspeed --launcher slurm' (or openmpi, ...)"
        )
    for program, remedy in needed.items():
        if shutil.which(program) is None:
            raise LauncherError(f"a replica on host {host!r} needs {program!r}, which is not installed here; {remedy}")


def launcher_command(config: MIIConfig, replica: ReplicaConfig, script: str) -> list[str]:
    """The command that runs a Python script once on a replica's host.

    Args:
        config: of the deployment.
        replica: where to run.
        script: path there.
    """
    hosts = ["-H", config.hostfile] if config.hostfile else []
    first_device = replica.gpu_indices[0] if replica.gpu_indices else 0
    return [
        *shlex.split(config.launcher),
        *hosts,
        *("-i", f"{replica.hostname}:{first_device}"),
        *("--master_addr", replica.hostname, "--master_port", str(replica.torch_dist_port)),
        *("--no_ssh_check", "--no_local_rank", "--force_multi"),
        script,
    ]


def write_script(folder: DeploymentFolder, role: str, sign: Path) -> str:
    """What the launcher runs there; returns its path. `sign`: file that is touched as long as the process is wanted."""
    path = folder.path / f"{role}.py"
    path.write_text(_SCRIPT.format(folder=str(folder.path), role=role, run=str(folder.run), sign=str(sign)))
    return str(path)


def run_there(folder: str, role: str, run: str, sign: str) -> None:
    """On the other host: becomes the front or the engine.

    Args:
        folder: of the deployment.
        role: "replica-<i>-front" or "replica-<i>-engine".
        run: where its sockets lie.
        sign: see `write_script`.
    """
    os.makedirs(run, mode=0o700, exist_ok=True)
    threading.Thread(target=_watch, args=(Path(sign),), daemon=True).start()
    sys.argv = [sys.argv[0], folder, role]
    module = "mii.launch.front" if role.endswith("-front") else "mii.launch.engine"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Entry point; see the module."""
    with Process.from_arguments() as process:
        replica = process.replica_config
        process.report(f"starting on {replica.hostname}")
        sign = _new_sign(process.folder, process.role)
        command = launcher_command(process.config, replica, write_script(process.folder, process.role, sign))
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        while not _is_open(replica.address):
            _check_runs(launcher, replica.hostname, _LOOK_SECONDS)
            sign.touch()
        process.ready(grpc=replica.tensor_parallel_ports[0])
        while not process.wait_stop(_LOOK_SECONDS):
            _check_runs(launcher, replica.hostname, 0)
            sign.touch()
        sign.unlink()
        launcher.wait(_LAUNCHER_END_SECONDS)


def _new_sign(folder: DeploymentFolder, role: str) -> Path:
    """Takes away that of a stand-in which was killed, so that its process over there ends."""
    for old in folder.path.glob(f"{role}-*.alive"):
        old.unlink(missing_ok=True)
    sign = folder.path / f"{role}-{os.getpid()}.alive"
    sign.touch(mode=0o600)
    return sign


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


def _check_runs(launcher: subprocess.Popen[bytes], host: str, seconds: float) -> None:
    try:
        code = launcher.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise LauncherError(f"the launcher of host {host!r} ended with exit code {code}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_LOOK_SECONDS).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
