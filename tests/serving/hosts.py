"""Two hosts on one machine: network namespaces that a virtual cable joins. They share files, and nothing else that
listens or is listened to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

__all__ = ["HERE", "NOWHERE", "THERE", "Hosts", "two_hosts"]

HERE, THERE, NOWHERE = "10.77.0.1", "10.77.0.2", "10.77.0.3"

# A shell on the other host, where there is one; the real ssh finds out that there is none.
_SSH = """#!/bin/sh
while [ "$1" = "-o" ]; do shift 2; done
host=$1; shift
if [ "$host" = {there} ] && [ ! -e {refuse} ]; then exec ip netns exec {name} sh -c "$*"; fi
exec {ssh} -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=no "$host" "$*"
"""
# Runs a command on some hosts, puts the host before each line, and fails where one does.
_PDSH = """#!{python}
import subprocess, sys
words = sys.argv[sys.argv.index("-w") + 1 :]
runs = []
for number, host in enumerate(words[0].split(",")):
    command = " ".join(words[1:]).replace("%n", str(number))
    runs.append((host, subprocess.Popen(["ssh", host, command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
for host, run in runs:
    for line in run.stdout:
        print(host + ":", line.decode("utf-8", "replace"), end="", flush=True)
sys.exit(max(abs(run.wait()) for _, run in runs))
"""


class Hosts:
    """The two of them.

    Args:
        folder: for programs and files.
    """

    def __init__(self, folder: Path) -> None:
        self._names = [f"mii-{os.getpid()}-{letter}" for letter in "ab"]
        self._programs = folder / "programs"
        self._refuse = folder / "refuse"
        self._programs.mkdir()
        values = {"there": THERE, "name": self._names[1], "ssh": shutil.which("ssh"), "refuse": self._refuse}
        for name, text in (("ssh", _SSH.format(**values)), ("pdsh", _PDSH.format(python=sys.executable))):
            (self._programs / name).write_text(text)
            (self._programs / name).chmod(0o755)

    def make(self) -> None:
        """Brings them up."""
        ends = [f"mii{os.getpid()}{letter}" for letter in "ab"]
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self._names, ends, (HERE, THERE), strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")

    def remove(self) -> None:
        """Ends what runs on them, and them."""
        for name in self._names:
            for pid in self.pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def pids(self, name: str) -> list[int]:
        """What runs on one of them."""
        done = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    @property
    def running(self) -> list[list[int]]:
        """The processes of each."""
        return [self.pids(name) for name in self._names]

    def refuse(self) -> None:
        """From now on the other host lets nobody in."""
        self._refuse.touch()

    def cable(self, state: str) -> None:
        """Cuts ("down") or mends ("up") what joins them; whoever sends hears nothing of it."""
        _ip("-n", self._names[1], "link", "set", f"mii{os.getpid()}b", state)

    def run(self, *words: str, there: bool = False, timeout: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Runs Python with some arguments on the first host, or the other one."""
        process = self.start(*words, there=there)
        try:
            out, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    def start(self, *words: str, there: bool = False) -> subprocess.Popen[str]:
        """As `run`, and does not wait."""
        # Importing DeepSpeed makes torch a folder for its compiler, among temporary files unless told where.
        compiler = {"TORCHINDUCTOR_CACHE_DIR": str(self._programs / "inductor")}
        environment = {**os.environ, **compiler, "PATH": f"{self._programs}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[there], sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Hosts that are gone afterwards. Skips the test where they cannot be made."""
    for program in ("ip", "ssh", "deepspeed"):
        if shutil.which(program) is None:
            pytest.skip(f"{program!r} is not installed")
    hosts = Hosts(folder)
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        yield hosts
    finally:
        hosts.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
