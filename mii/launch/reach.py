"""Whether a replica can run on another host, found out with one call of ssh before anything is started there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import msgspec

import mii
from mii.errors import LauncherError

__all__ = ["check_host"]

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SSH_FAILED, _NOT_THERE = 255, (126, 127)
_SECONDS = 60.0
_MARK = "mii-found "
_LOOK = """\
import json, os, socket
found = {{"version": "", "error": "", "folder": os.path.isdir({folder!r}), "taken": []}}
try:
    import mii
    found["version"] = mii.__version__
except ImportError as error:
    found["error"] = str(error)
for port in {ports!r}:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            found["taken"].append(port)
print({mark!r} + json.dumps(found))
"""


class _Found(msgspec.Struct):
    """What there is on a host: mii's version or why it has none, the deployment's folder, and ports that are taken."""

    version: str
    error: str
    folder: bool
    taken: list[int]


def check_host(host: str, folder: str, ports: Sequence[int]) -> list[int]:
    """Makes sure that processes of a deployment can run on another host. Returns those of some ports that are taken.

    Args:
        host: which one.
        folder: of the deployment, which both hosts must see.
        ports: to look at.

    Raises:
        LauncherError: the host cannot be reached, or something is missing there.
    """
    found = _look(host, _LOOK.format(folder=folder, ports=list(ports), mark=_MARK))
    if found.error:
        raise LauncherError(f"{sys.executable} on host {host!r} has no mii ({found.error}); install it there as here")
    if found.version != mii.__version__:
        raise LauncherError(
            f"host {host!r} has mii {found.version} and this one has {mii.__version__}; install the same on both"
        )
    if not found.folder:
        raise LauncherError(
            f"host {host!r} does not see {folder}; set MII_CACHE_PATH to a folder that is shared by all hosts"
        )
    return found.taken


def _look(host: str, script: str) -> _Found:
    paths = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    there = shlex.join(["env", paths, "PYTHONSAFEPATH=1", sys.executable, "-c", script])
    try:
        done = subprocess.run([*_SSH, host, there], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise LauncherError(f"host {host!r} did not answer ssh within {_SECONDS:g} s") from None
    output = done.stdout.decode("utf-8", "replace")
    for line in output.splitlines():
        if line.startswith(_MARK):
            return msgspec.json.decode(line.removeprefix(_MARK), type=_Found)
    errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = errors[-1] if errors else f"exit code {done.returncode}"
    if done.returncode == _SSH_FAILED:
        raise LauncherError(
            f"host {host!r} cannot be reached with ssh: {last}; make 'ssh {host} true' work without a password"
        )
    if done.returncode in _NOT_THERE:
        raise LauncherError(f"host {host!r} has no {sys.executable}; install Python and mii there as here ({last})")
    raise LauncherError(f"Python cannot be run on host {host!r}: {last}")
