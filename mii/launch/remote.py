"""Stands in for a process of a replica on another host: brings it up there through DeepSpeed's launcher.

    python -m mii.launch.remote <folder of the deployment> <role>

The other host needs mii in the same Python, and the deployment's folder (`MII_CACHE_PATH`) on a file system that both
hosts have. What the process prints comes back through the launcher into this role's log. It counts as ready when the
front's port is open, which it is once the engine is ready.
"""

from __future__ import annotations

import ctypes
import shlex
import shutil
import signal
import socket
import subprocess

from mii.config import MIIConfig, ReplicaConfig
from mii.errors import LauncherError
from mii.launch.folder import DeploymentFolder
from mii.launch.process import PR_SET_PDEATHSIG, Process

__all__ = ["check_launcher", "launcher_command", "main"]

_LOOK_SECONDS = 0.5
_LAUNCHER_END_SECONDS = 2.5  # it has to reach the other host before it ends

_SCRIPT = """\
import os, runpy, sys
folder, role, run, module = {folder!r}, {role!r}, {run!r}, {module!r}
os.makedirs(run, mode=0o700, exist_ok=True)
sys.argv = [sys.argv[0], folder, role]
runpy.run_module(module, run_name="__main__", alter_sys=True)
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
        script: path there. The launcher ends remote processes by it, so it must be nobody else's.
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


def write_script(folder: DeploymentFolder, role: str) -> str:
    """What the launcher runs there; returns its path."""
    path = folder.remote_script(role)
    module = "mii.launch.front" if role.endswith("-front") else "mii.launch.engine"
    path.write_text(_SCRIPT.format(folder=str(folder.path), role=role, run=str(folder.run), module=module))
    return str(path)


def main() -> None:
    """Entry point; see the module."""
    with Process.from_arguments() as process:
        replica = process.replica_config
        process.report(f"starting on {replica.hostname}")
        command = launcher_command(process.config, replica, write_script(process.folder, process.role))
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
        while not _is_open(replica.address):
            _check_runs(launcher, replica.hostname, _LOOK_SECONDS)
        process.ready(grpc=replica.tensor_parallel_ports[0])
        while not process.wait_stop(_LOOK_SECONDS):
            _check_runs(launcher, replica.hostname, 0)
        launcher.terminate()
        launcher.wait(_LAUNCHER_END_SECONDS)


def _check_runs(launcher: subprocess.Popen[bytes], host: str, seconds: float) -> None:
    try:
        code = launcher.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise LauncherError(f"the launcher of host {host!r} ended with exit code {code}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_LOOK_SECONDS).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
