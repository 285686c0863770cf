"""Deployments of stand-in processes: start, failure, restart, ports, logs, and what is left: nothing."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from mii.backend import deployment
from mii.backend.ports import PortClaims
from mii.backend.server import MIIServer
from mii.config import MIIConfig, get_mii_config
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError, DeploymentExistsError, DeploymentNotFoundError, LauncherError, PortTakenError
from mii.launch import child
from mii.launch.state import Spec, read_state
from tests.serving.deployments import (
    StandIns,
    config,
    ended_with,
    fork,
    free_port,
    log_of,
    pid_of,
    processes_of,
    wait_until,
)

ROLES = ["balancer", "replica-0-front", "replica-0-engine", "gateway"]


def is_back(name: str, role: str, killed: int) -> bool:
    state = read_state(deployment_folder(name).state_file)
    assert state is not None
    process = next(process for process in state.processes if process.role == role)
    return process.stage == "ready" and process.pid != killed


@pytest.mark.parametrize("name", ["demo", "with space", "org/model", "ü/../x", "x" * 200])
def test_it_starts_under_any_name_is_found_and_ends(stand_ins: StandIns, name: str) -> None:
    server = MIIServer(config(name, enable_restful_api=True))
    status = deployment.find(name)
    assert status.alive and status.stage == "running"
    assert status.config == server.mii_config == get_mii_config(name)
    assert status.state is not None and [process.role for process in status.state.processes] == [
        "balancer",
        "replica-0-front",
        "replica-0-engine",
        "gateway",
    ]
    assert all(process.stage == "ready" and process.pid for process in status.state.processes)
    server.terminate()
    with pytest.raises(DeploymentNotFoundError):
        deployment.find(name)
    with pytest.raises(DeploymentNotFoundError):
        deployment.stop(name)


def test_everything_of_it_is_its_owners_alone(stand_ins: StandIns, cache: Path) -> None:
    server = MIIServer(config())
    folder = deployment_folder("demo")
    for path in [folder.path, *folder.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert len(folder.read_token()) == 32
    assert folder.read_token() not in "".join(processes_of(cache).values())
    server.terminate()


def test_it_outlives_the_process_that_started_it_and_ends_from_another(stand_ins: StandIns) -> None:
    assert ended_with(fork(lambda: MIIServer(config()))) == 0
    assert deployment.find("demo").stage == "running"
    deployment.stop("demo")


def test_an_attached_one_ends_with_the_process_that_started_it(stand_ins: StandIns, cache: Path) -> None:
    def serve_and_die() -> None:
        MIIServer(config(), attached=True)
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended_with(fork(serve_and_die)) == -signal.SIGKILL
    wait_until(lambda: not processes_of(cache))


def test_it_is_not_started_by_several_processes_of_a_launcher(
    stand_ins: StandIns, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_device = config(model={"tensor_parallel": 1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        LauncherError, match=r"WORLD_SIZE is \d.*; start this one with plain python, or unset WORLD_SIZE"
    ):
        MIIServer(one_device)
    assert list(cache.iterdir()) == []


def test_a_name_that_runs_is_refused_and_the_running_one_goes_on(stand_ins: StandIns) -> None:
    server = MIIServer(config())
    with pytest.raises(DeploymentExistsError, match=r"'demo' is running; use it with mii.client\('demo'\)"):
        MIIServer(config())
    assert deployment.find("demo").stage == "running"
    server.terminate()


@pytest.mark.parametrize("role", ROLES)
def test_a_part_that_fails_ends_the_start_with_its_reason_and_its_log(stand_ins: StandIns, role: str) -> None:
    stand_ins(role, fail="no such model", start=0.1)
    with pytest.raises(DeploymentError) as caught:
        MIIServer(config(enable_restful_api=True))
    first, second, *log = str(caught.value).splitlines()
    assert first == f"deployment 'demo' failed: {role}: ValueError: no such model"
    assert second == "the end of its log:"
    assert "stand-in starts" in log


def test_a_part_that_is_killed_ends_the_start_and_is_named(stand_ins: StandIns, cache: Path) -> None:
    stand_ins("replica-0-engine", start=60.0)

    def kill_engine() -> None:
        wait_until(lambda: bool(pid_of(deployment_folder("demo"), "replica-0-engine")))
        os.kill(pid_of(deployment_folder("demo"), "replica-0-engine") or 0, signal.SIGKILL)

    killer = fork(kill_engine)
    with pytest.raises(DeploymentError, match="'demo' failed: replica-0-engine was killed by SIGKILL"):
        MIIServer(config())
    assert ended_with(killer) == 0


def test_a_start_that_takes_too_long_is_ended(stand_ins: StandIns) -> None:
    stand_ins("replica-0-engine", start=60.0)
    with pytest.raises(DeploymentError, match=r": it was not ready within start_seconds=0\.5"):
        MIIServer(config(start_seconds=0.5))


def test_a_program_that_cannot_be_started_is_named(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIns, "_command", lambda *_: ["/nowhere/python"])
    with pytest.raises(
        DeploymentError, match=r"replica-0-front: it cannot be started: .*No such file.*/nowhere/python"
    ):
        MIIServer(config())


@pytest.mark.parametrize("role", ROLES)
def test_a_part_that_is_killed_is_started_again(
    stand_ins: StandIns, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MIIServer(config(enable_restful_api=True), attached=True)
    killed = pid_of(deployment_folder("demo"), role) or 0
    os.kill(killed, signal.SIGKILL)
    notices = server.notices()
    assert next(notices).startswith(f"{role} was killed by SIGKILL; starting it again in 0.")
    assert next(notices) == f"{role} is back"
    assert is_back("demo", role, killed)
    server.terminate()
    assert list(notices) == []


def test_a_replica_that_never_comes_back_is_given_up_while_the_other_serves(stand_ins: StandIns) -> None:
    stand_ins("replica-1-engine", fail_again=True)
    server = MIIServer(config(max_restarts=1, model={"replica_num": 2}), attached=True)
    os.kill(pid_of(deployment_folder("demo"), "replica-1-engine") or 0, signal.SIGKILL)
    notices = server.notices()
    next(notices)
    assert next(notices) == "replica-1-engine: ValueError: again; it died too often and is given up"
    wait_until(lambda: pid_of(deployment_folder("demo"), "replica-1-front") is None)
    status = deployment.find("demo")
    assert status.stage == "running" and status.state is not None
    stages = {process.role: process.stage for process in status.state.processes}
    assert stages["replica-1-engine"] == stages["replica-1-front"] == "given up"
    assert stages["replica-0-engine"] == stages["replica-0-front"] == "ready"
    server.terminate()


def test_without_a_replica_left_it_ends_and_its_reason_and_logs_stay_until_it_is_stopped(
    stand_ins: StandIns, cache: Path
) -> None:
    stand_ins("replica-0-engine", fail_again=True)
    server = MIIServer(config(max_restarts=1), attached=True)
    os.kill(pid_of(deployment_folder("demo"), "replica-0-engine") or 0, signal.SIGKILL)
    with pytest.raises(DeploymentError, match="'demo' failed: replica-0-engine: ValueError: again"):
        list(server.notices())
    assert processes_of(cache) == {}
    status = deployment.find("demo")
    assert status.stage == "failed" and status.state is not None
    assert status.state.reason.startswith("replica-0-engine: ValueError: again")
    assert "ValueError: again" in log_of("demo", "replica-0-engine")
    deployment.stop("demo")


def test_a_failed_one_makes_room_for_another_of_its_name(stand_ins: StandIns) -> None:
    stand_ins("balancer", fail_again=True)
    server = MIIServer(config(max_restarts=0), attached=True)
    os.kill(pid_of(deployment_folder("demo"), "balancer") or 0, signal.SIGKILL)
    with pytest.raises(DeploymentError):
        list(server.notices())
    del stand_ins.behaviours["balancer"]
    MIIServer(config()).terminate()


def test_two_run_side_by_side_on_ports_of_their_own(stand_ins: StandIns) -> None:
    model = {"model_name_or_path": "m", "progress": False, "device": "cpu"}
    first, second = (MIIServer(MIIConfig(deployment_name=name, model_config=model)) for name in ("one", "two"))
    assert first.mii_config.port_number != second.mii_config.port_number
    assert [status.name for status in deployment.statuses()] == ["one", "two"]
    first.terminate()
    assert [status.stage for status in deployment.statuses()] == ["running"]
    second.terminate()


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_with_its_owner(stand_ins: StandIns) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"port {port} \(port_number\) is taken by process {os.getpid()} \("):
            MIIServer(config(port_number=port))


def test_a_port_that_somebody_takes_after_its_choice_is_replaced(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = deployment.choose_ports, []

    def choose(given: MIIConfig, reserved: set[int], claims: PortClaims) -> MIIConfig:
        tries.append(given)
        chosen = real(config(port_number=free_port()), reserved, claims)
        if len(tries) == 1:  # as if it had been free just now
            chosen.port_number = other.getsockname()[1]
        return chosen

    monkeypatch.setattr(deployment, "choose_ports", choose)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = MIIServer(config())
        assert len(tries) == 2 and tries[0] is tries[1]
        assert server.mii_config.port_number != other.getsockname()[1]
        server.terminate()


def test_somebody_who_is_always_quicker_is_an_error(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        chosen = config(port_number=other.getsockname()[1])
        monkeypatch.setattr(deployment, "choose_ports", lambda given, reserved, claims: chosen)
        with pytest.raises(DeploymentError, match=f"balancer: port {chosen.port_number} is taken"):
            MIIServer(config())


def test_starts_and_stops_in_a_row_leave_nothing(stand_ins: StandIns, cache: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        MIIServer(config()).terminate()
        assert not any(path for path in cache.rglob("*") if not path.is_dir())
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_the_log_of_a_part_is_bounded_in_an_error(stand_ins: StandIns, cache: Path) -> None:
    folder = deployment_folder("demo")
    folder.path.mkdir(parents=True)
    folder.create()
    folder.log("engine").write_bytes(b"x" * 100_000 + b"\n" + b"\xff line\n" * 100)
    assert child.read_tail(folder, "engine") == "\n".join(["\ufffd line"] * 15)
    folder.remove()


def test_a_log_that_grows_long_keeps_its_end_and_goes_on(stand_ins: StandIns, cache: Path) -> None:
    folder = deployment_folder("demo")
    folder.path.mkdir(parents=True)
    folder.create()
    part = child.Child(Spec("engine", []), folder, 0)
    part.trim_log()  # there is none yet
    with open(folder.log("engine"), "ab", buffering=0) as log:
        log.write(b"short\n")
        part.trim_log()
        assert folder.log("engine").read_bytes() == b"short\n"
        log.write(b"x" * child.LONGEST_LOG_BYTES + b"\nlast\n")
        part.trim_log()
        log.write(b"next\n")
    kept = folder.log("engine").read_bytes()
    assert len(kept) < child.LONGEST_LOG_BYTES / 8
    assert kept.startswith(b"(the beginning was cut off)") and kept.endswith(b"x\nlast\nnext\n")
    folder.remove()
