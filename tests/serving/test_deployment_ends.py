"""How deployments of stand-in processes end: drained, in a hurry, killed, with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mii.backend import deployment
from mii.backend.server import MIIServer
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError
from mii.launch import supervisor
from tests.serving.deployments import StandIns, config, ended_with, fork, log_of, pid_of, processes_of, wait_until


def test_the_doors_drain_before_the_replicas_end(stand_ins: StandIns, cache: Path) -> None:
    stand_ins("balancer", drain=0.4)
    server = MIIServer(config())
    engine = pid_of(deployment_folder("demo"), "replica-0-engine")
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: "stand-in drains" in log_of("demo", "balancer"))
    assert "stand-in drains" not in log_of("demo", "replica-0-engine")
    assert Path(f"/proc/{engine}").exists()
    wait_until(lambda: not processes_of(cache))


def test_what_does_not_drain_in_time_is_killed(stand_ins: StandIns) -> None:
    stand_ins("balancer", deaf=True)
    server = MIIServer(config(drain_seconds=0.2))
    started = time.monotonic()
    server.terminate()
    assert time.monotonic() - started < 0.2 + supervisor.END_SECONDS


def test_whoever_is_in_a_hurry_does_not_wait_for_the_drain(stand_ins: StandIns) -> None:
    stand_ins("balancer", drain=60.0)
    server = MIIServer(config(drain_seconds=60))
    server.terminate(hurry=True)


def test_whoever_stops_one_waits_for_a_supervisor_that_was_quick_to_clear_away(
    stand_ins: StandIns, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, lock, helpers = deployment._send, deployment_folder("demo").lock_file, []

    def send_and_come_late(pid: int, number: signal.Signals) -> None:
        send(pid, number)
        while lock.exists():
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        helpers.append(fork(lambda: (time.sleep(0.3), os.kill(pid, signal.SIGCONT))))

    server = MIIServer(config())
    monkeypatch.setattr(deployment, "_send", send_and_come_late)
    server.terminate(hurry=True)
    assert processes_of(cache) == {}
    assert [ended_with(helper) for helper in helpers] == [0]


def test_a_part_may_ask_for_the_end(stand_ins: StandIns, cache: Path) -> None:
    stand_ins("balancer", stop=True)
    server = MIIServer(config(), attached=True)
    assert list(server.notices()) == []
    assert processes_of(cache) == {}


def test_a_killed_supervisor_takes_its_processes_along_and_the_rest_is_cleared_away(
    stand_ins: StandIns, cache: Path
) -> None:
    server = MIIServer(config())
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(cache))
    assert deployment.find("demo").stage == "killed"
    assert not deployment.find("demo").alive
    lock = deployment_folder("demo").lock_file
    lock.write_text(f"{server.pid}00")  # processes are counted from 1 again some time, and the next number is shorter
    following = MIIServer(config())
    assert int(lock.read_text()) == following.pid
    following.terminate()


def test_a_supervisor_that_is_killed_while_it_starts_is_an_error_and_leaves_nothing(stand_ins: StandIns) -> None:
    stand_ins("replica-0-engine", start=60.0)

    def kill_supervisor() -> None:
        folder = deployment_folder("demo")
        wait_until(lambda: bool(pid_of(folder, "replica-0-engine")))
        os.kill(int(folder.lock_file.read_text()), signal.SIGKILL)

    killer = fork(kill_supervisor)
    with pytest.raises(DeploymentError, match="'demo' failed: its supervisor was killed"):
        MIIServer(config())
    assert ended_with(killer) == 0


SCRIPT = """
import sys
from tests.serving.deployments import StandIns, config
from mii.backend.server import MIIServer
import pytest
with pytest.MonkeyPatch.context() as patch:
    stand_ins = StandIns(patch)
    stand_ins("replica-0-engine", start=60.0)
    print("starting", flush=True)
    MIIServer(config())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_starts_it_and_is_ended_leaves_nothing(cache: Path, number: signal.Signals) -> None:
    script = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT)], stderr=subprocess.PIPE)
    wait_until(lambda: bool(pid_of(deployment_folder("demo"), "replica-0-engine")))
    script.send_signal(number)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == -number, errors
    assert (b"KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    wait_until(lambda: not processes_of(cache))
    wait_until(lambda: not deployment_folder("demo").path.exists())
