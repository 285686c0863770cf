"""A process of a deployment that serves nothing, to try the supervisor on: ``idle_process.py FOLDER ROLE BEHAVIOUR``.

BEHAVIOUR is JSON; see `Behaviour`.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import msgspec

from mii.errors import PortTakenError
from mii.launch.folder import DeploymentFolder
from mii.launch.process import Process
from mii.launch.state import read_state


class Behaviour(msgspec.Struct, omit_defaults=True):
    """What a stand-in does.

    Args:
        start: seconds until it is ready.
        fail: what it fails with instead.
        port: it listens there.
        drain: seconds that it takes to end.
        steps: how many steps of progress it reports.
        stop: it asks for the deployment's end once that runs.
        fail_again: it fails whenever it is started after the first time.
        deaf: it does not end when it is told to.
    """

    start: float = 0.0
    fail: str = ""
    port: int = 0
    drain: float = 0.0
    steps: int = 0
    stop: bool = False
    fail_again: bool = False
    deaf: bool = False


def main() -> None:
    behaviour = msgspec.json.decode(sys.argv[3], type=Behaviour)
    with Process(sys.argv[1], sys.argv[2]) as process, socket.socket() as listener:
        print("stand-in starts", flush=True)
        for step in range(behaviour.steps):
            process.report("loading", step + 1, behaviour.steps, "B")
        time.sleep(behaviour.start)
        if behaviour.fail:
            raise ValueError(behaviour.fail)
        if behaviour.fail_again:
            _fail_unless_first(process.folder.path / f"{process.role}.was-here")
        if behaviour.port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(listener, behaviour.port)
            listener.listen()
        process.ready(**({"grpc": behaviour.port} if behaviour.port else {}))
        if behaviour.stop:
            _wait_running(process.folder)
            process.stop_deployment("asked to")
        process.wait_stop()
        print("stand-in drains", flush=True)
        time.sleep(1000 if behaviour.deaf else behaviour.drain)
        print("stand-in ends", flush=True)


def _bind(listener: socket.socket, port: int) -> None:
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise PortTakenError(f"port {port} is taken") from error


def _wait_running(folder: DeploymentFolder) -> None:
    while (state := read_state(folder.state_file)) is None or state.stage != "running":
        time.sleep(0.01)


def _fail_unless_first(mark: Path) -> None:
    if mark.exists():
        raise ValueError("again")
    mark.touch()


if __name__ == "__main__":
    main()
