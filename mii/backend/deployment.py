"""Deployments on this machine: starting one, finding them, ending one, and clearing away what a killed one left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from mii.backend.plan import make_plan, python_environment
from mii.backend.ports import PortClaims, choose_ports, ports_of
from mii.config import MIIConfig, default_deployment_name, get_mii_config
from mii.config.model import world_size
from mii.config.registry import (
    check_can_be_saved,
    deployment_folder,
    deployment_names,
    forget_deployment,
    make_registry_folder,
    registry_folder,
    save_deployment,
    writing_registry,
)
from mii.constants import SERVER_STOP_GRACE_SECONDS
from mii.errors import DeploymentError, DeploymentExistsError, DeploymentNotFoundError, LauncherError
from mii.launch.child import read_tail
from mii.launch.folder import DeploymentFolder
from mii.launch.lock import acquire, is_held, locked, watched
from mii.launch.state import (
    SUPERVISOR,
    Event,
    EventReader,
    Failure,
    State,
    read_plan,
    read_state,
    start_ticks,
    write_private,
)
from mii.launch.supervisor import END_SECONDS, STARTER_ENV

__all__ = ["Launch", "Status", "find", "find_alive", "launch", "reserved_ports", "statuses", "stop"]

_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Status:
    """A deployment as its files tell it.

    Args:
        name: of the deployment.
        config: with the ports that were chosen.
        state: what the supervisor wrote last; None: it has written nothing yet.
        alive: whether its supervisor runs.
    """

    name: str
    config: MIIConfig
    state: State | None
    alive: bool

    @property
    def stage(self) -> str:
        """One of starting, running, stopping, failed; or killed, where a dead supervisor has left something else."""
        if self.alive:
            return self.state.stage if self.state else "starting"
        return "failed" if self.state and self.state.stage == "failed" else "killed"


class Launch:
    """A deployment that was just started, as its starter sees it.

    Args:
        config: with the ports that were chosen.
        process: the supervisor.
        connection: the socket that its events come from.
        claims: its ports, until it listens on them.
    """

    def __init__(
        self, config: MIIConfig, process: subprocess.Popen[bytes], connection: socket.socket, claims: PortClaims
    ) -> None:
        self.config, self.claims = config, claims
        self.pid = process.pid
        self._folder = deployment_folder(config.deployment_name)
        self._connection, self._events = connection, EventReader(connection)
        # Without this the supervisor would stay a zombie of this process once it has ended.
        self._reaper = threading.Thread(target=process.wait, name="mii-supervisor-reaper", daemon=True)
        self._reaper.start()

    def events(self) -> Iterator[Event]:
        """What the supervisor tells, until it has ended.

        Raises:
            DeploymentError: it was killed. What it left has been cleared away.
        """
        failure = False
        for event in self._events:
            failure = failure or isinstance(event, Failure)
            yield event
        self._reaper.join(END_SECONDS)
        if not failure and self._folder.path.exists() and not _has_failed(self._folder):
            log = read_tail(self._folder, SUPERVISOR)
            clear_leftovers(self.config.deployment_name)
            raise DeploymentError(describe_failure(self.config.deployment_name, "its supervisor was killed", log))

    def end(self) -> None:
        """Ends it at once and waits until nothing of it is left; one that has ended is fine."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._reaper.is_alive():
                _send(self.pid, number)
                self._reaper.join(END_SECONDS)
        self.close()
        clear_leftovers(self.config.deployment_name)

    def close(self) -> None:
        """Stops listening; the deployment goes on, unless it was started as attached."""
        self._connection.close()


def launch(config: MIIConfig, *, attached: bool = False) -> Launch:
    """Starts the supervisor of a new deployment, which starts everything else.

    Args:
        config: what was asked for.
        attached: the deployment ends when this process does.

    Raises:
        DeploymentExistsError: one of this name is running.
        LauncherError: this process is one of several that a launcher started; or see `make_plan`.
        PortTakenError, PlacementError, HostfileError: see `choose_ports`.
        UnsupportedFeatureError: see `mii.config.registry.save_deployment`.
        RegistryError: the files cannot be made.
        OSError: the process cannot be made.
    """
    if world_size() > 1:
        raise LauncherError(
            f"a deployment starts its processes itself, and WORLD_SIZE is {world_size()}, as where a launcher starts "
            "several; start this one with plain python, or unset WORLD_SIZE"
        )
    check_can_be_saved(config)
    with writing_registry():
        make_registry_folder()
    folder = deployment_folder(config.deployment_name)
    with locked(registry_folder() / ".lock"):
        if is_held(folder.lock_file):
            raise DeploymentExistsError(
                f"a deployment {config.deployment_name!r} is running; use it with "
                f"mii.client({config.deployment_name!r}), end it with 'mii stop \"{config.deployment_name}\"', or give "
                "this one another deployment_name"
            )
        _end_leftover_processes(folder)
        claims = PortClaims()
        config = choose_ports(config, reserved_ports(), claims)
        plan = make_plan(config, folder, attached=attached)
        try:
            with writing_registry():
                folder.create()
                save_deployment(config)
                write_private(folder.plan_file, msgspec.json.encode(plan))
            return Launch(config, *_start_supervisor(folder), claims)
        except BaseException:
            claims.release()
            folder.remove()
            raise


def statuses() -> list[Status]:
    """Every deployment of this user, by name. One whose files are damaged is left out."""
    found = []
    for name in deployment_names():
        with contextlib.suppress(DeploymentNotFoundError):
            found.append(find(name))
    return found


def find(model_or_deployment_name: str) -> Status:
    """One deployment, by its name or, where it was not given one, by its model's.

    Raises:
        DeploymentNotFoundError: there is none.
    """
    config = get_mii_config(model_or_deployment_name)
    folder = deployment_folder(config.deployment_name)
    return Status(config.deployment_name, config, read_state(folder.state_file), is_held(folder.lock_file))


def find_alive(model_or_deployment_name: str) -> Status:
    """One deployment that runs or starts.

    Raises:
        DeploymentNotFoundError: there is none of that name, or it has ended by itself.
    """
    status = find(model_or_deployment_name)
    if status.alive:
        return status
    why = status.state.reason if status.state and status.state.reason else "its supervisor was killed"
    raise DeploymentNotFoundError(
        f"deployment {status.name!r} has ended: {why}; its logs are in {deployment_folder(status.name).path / 'logs'}, "
        f"'mii stop \"{status.name}\"' removes them"
    )


def stop(model_or_deployment_name: str, *, hurry: bool = False) -> None:
    """Ends a deployment and waits until nothing of it is left. What runs may finish first, for `drain_seconds`.

    Args:
        model_or_deployment_name: which one. One that has failed or was killed is cleared away.
        hurry: what runs may not finish.

    Raises:
        DeploymentNotFoundError: there is none.
    """
    name = _name_of(model_or_deployment_name)
    folder = deployment_folder(name)
    pid = _supervisor_pid(folder)
    with watched(folder.lock_file) as released:
        if pid and not released(0.0):
            seconds = _drain_seconds(folder) + END_SECONDS
            _send(pid, signal.SIGINT if hurry else signal.SIGTERM)
            if not released(seconds):
                _send(pid, signal.SIGKILL)  # its processes die with it
                released(END_SECONDS)
    clear_leftovers(name)


def clear_leftovers(deployment_name: str) -> None:
    """Ends what a dead supervisor may have left running, and removes the deployment's folder; one that lives stays."""
    if not registry_folder().exists():
        return
    folder = deployment_folder(deployment_name)
    with locked(registry_folder() / ".lock"):
        if folder.path.exists() and not is_held(folder.lock_file):
            _end_leftover_processes(folder)
            forget_deployment(deployment_name)


def describe_failure(deployment_name: str, what: str, log: str) -> str:
    """What failed and why in the first line, and the end of its log."""
    text = f"deployment {deployment_name!r} failed: {what}"
    return f"{text}\nthe end of its log:\n{log}" if log else text


def _name_of(model_or_deployment_name: str) -> str:
    """The name of a deployment that is given by its own or its model's name; its config need not be readable."""
    for name in (model_or_deployment_name, default_deployment_name(model_or_deployment_name)):
        with contextlib.suppress(OSError, ValueError):  # no file can have such a name
            if deployment_folder(name).config_file.exists():
                return name
    return get_mii_config(model_or_deployment_name).deployment_name


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _drain_seconds(folder: DeploymentFolder) -> float:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return read_plan(folder.plan_file).drain_seconds
    return SERVER_STOP_GRACE_SECONDS


def _start_supervisor(folder: DeploymentFolder) -> tuple[subprocess.Popen[bytes], socket.socket]:
    here, there = socket.socketpair()
    lock = acquire(folder.lock_file)
    os.ftruncate(lock, 0)  # a supervisor that was killed has left its number, which may be longer than the next one's
    changes = {**python_environment(os.environ), STARTER_ENV: f"{there.fileno()}:{lock}"}
    merged = {**os.environ, **changes}
    try:
        with open(os.open(folder.log(SUPERVISOR), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mii.launch.supervisor", str(folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in merged.items() if value is not None},
                pass_fds=(there.fileno(), lock),
                start_new_session=True,  # Ctrl-C in the caller's terminal is not for it
            )
        os.write(lock, str(process.pid).encode())
    except BaseException:
        here.close()
        raise
    finally:
        there.close()
        os.close(lock)
    return process, here


def _supervisor_pid(folder: DeploymentFolder) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(folder.lock_file.read_text())
    return None


def reserved_ports() -> set[int]:
    """Those of deployments that run, or start and do not listen yet."""
    return {port for status in statuses() if status.alive for port in ports_of(status.config)}


def _has_failed(folder: DeploymentFolder) -> bool:
    state = read_state(folder.state_file)
    return state is not None and state.stage == "failed"


def _end_leftover_processes(folder: DeploymentFolder) -> None:
    """The kernel has killed them together with their supervisor; this waits for it, and makes sure."""
    state = read_state(folder.state_file)
    for process in state.processes if state else ():
        while process.pid and process.start_ticks and start_ticks(process.pid) == process.start_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
