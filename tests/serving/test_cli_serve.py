"""`mii serve`, `list` and `stop` over stand-in processes, as a user of a shell sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mii import cli_serve
from mii.backend import deployment
from mii.backend.server import MIIServer
from mii.cli import main
from mii.config.registry import deployment_folder
from tests.serving.deployments import StandIns, config, free_port, pid_of, processes_of, wait_until

SERVE = """
import sys
import pytest
from mii.cli import main
from tests.serving.deployments import StandIns
with pytest.MonkeyPatch.context() as patch:
    stand_ins = StandIns(patch)
    stand_ins("balancer", drain={drain})
    sys.exit(main(["serve", "org/model", "--device", "cpu", "--name", "demo", *sys.argv[1:]]))
"""


def serve(*words: str, drain: float = 0.0) -> subprocess.Popen[str]:
    script = textwrap.dedent(SERVE).format(drain=drain)
    command = [sys.executable, "-c", script, "--port", str(free_port()), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_until(command: subprocess.Popen[str], text: str) -> None:
    """Until it has written this to standard error, or has ended."""
    assert command.stderr is not None
    for line in command.stderr:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stays_in_the_foreground_and_drains_when_it_is_told_to_end(cache: Path, number: signal.Signals) -> None:
    command = serve(drain=0.3)
    read_until(command, "Ctrl-C ends it")
    command.send_signal(number)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 0, errors
    assert "running requests have 10 s to finish; Ctrl-C again ends them now" in errors
    assert processes_of(cache) == {}


def test_a_second_ctrl_c_does_not_wait_for_the_drain(cache: Path) -> None:
    command = serve("--option", "drain_seconds=60", drain=60.0)
    read_until(command, "Ctrl-C ends it")
    command.send_signal(signal.SIGINT)
    read_until(command, "Ctrl-C again")
    wait_until(lambda: "drains" in deployment_folder("demo").log("balancer").read_text())
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    assert command.returncode == 0


def test_it_tells_what_happens_and_ends_with_the_deployment(cache: Path) -> None:
    command = serve("--no-progress")
    read_until(command, "Ctrl-C ends it")
    os.kill(pid_of(deployment_folder("demo"), "balancer") or 0, signal.SIGKILL)
    assert command.stderr is not None
    assert "balancer was killed by SIGKILL; starting it again" in command.stderr.readline()
    assert command.stderr.readline() == "balancer is back\n"
    assert main(["stop", "demo"]) == 0
    assert command.wait(timeout=60) == 0
    command.stderr.close()


def test_a_foreground_that_is_killed_takes_the_deployment_along(cache: Path) -> None:
    command = serve("--no-progress")
    read_until(command, "Ctrl-C ends it")
    command.kill()
    command.communicate(timeout=60)
    wait_until(lambda: not processes_of(cache))


def test_detached_it_returns_and_shows_what_each_part_did(
    stand_ins: StandIns, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_ins("replica-0-engine", steps=5)
    words = ["--device", "cpu", "--name", "a b/c", "--port", str(free_port()), "--http", "--replicas", "2"]
    assert main(["serve", "org/model", *words, "--detach"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert any(line.endswith("s  replica-0-engine: loading 1 B of 5 B") for line in lines)
    assert any("s  balancer: ready: grpc on port " in line for line in lines)
    chosen = deployment.find("a b/c").config
    assert f"deployment 'a b/c': gRPC on 127.0.0.1:{chosen.port_number}, HTTP on http://localhost:" in lines[-1]
    assert main(["list"]) == 0
    header, row = capfd.readouterr().out.splitlines()
    assert header.split() == ["NAME", "STAGE", "REPLICAS", "MODEL", "GRPC", "HTTP", "UP", "RESTARTS"]
    assert row.startswith(f"a b/c  running  2         org/model  127.0.0.1:{chosen.port_number}  localhost:")
    assert main(["list", "--json"]) == 0
    (listed,) = json.loads(capfd.readouterr().out)
    assert (listed["name"], listed["restarts"], len(listed["processes"])) == ("a b/c", 0, 6)
    assert main(["stop", "a b/c"]) == 0
    assert main(["list"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_a_part_that_fails_is_one_line_and_the_end_of_its_log(
    stand_ins: StandIns, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_ins("replica-0-engine", fail="no such model")
    assert main(["serve", "org/model", "--name", "demo", "--no-progress"]) == 1
    first, second, *log = capfd.readouterr().err.splitlines()
    assert first == "mii serve: error: deployment 'demo' failed: replica-0-engine: ValueError: no such model"
    assert second == "the end of its log:" and "stand-in starts" in log


def test_without_a_model_the_default_one_is_served(
    stand_ins: StandIns, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_serve, "default_model", lambda: "org/default")
    assert main(["serve", "--detach", "--no-progress", "--name", "demo"]) == 0
    assert deployment.find("demo").config.model_conf.model_name_or_path == "org/default"
    assert main(["stop", "demo"]) == 0
    capfd.readouterr()


def test_wrong_options_start_nothing(stand_ins: StandIns, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["org/model", "--replicas", "0"], "replica_num=0 must be"),
        (["org/model", "--option", "nonsense=1"], "mii.serve has no option 'nonsense'"),
        (["./no/folder"], "there is no folder or file ./no/folder"),
        (["org/model", "--device", "cpu", "--device-map", "[[0], [0]]", "--replicas", "2"], "device 0 is used twice"),
    ):
        assert main(["serve", *words]) in (1, 2)
        assert message in capfd.readouterr().err
    assert not list(cache.rglob("*.json"))


def test_stop_takes_names_or_all(stand_ins: StandIns, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "three"):
        MIIServer(config(name))
    assert main(["stop"]) == 2
    assert main(["stop", "one", "--all"]) == 2
    assert main(["stop", "one"]) == 0
    assert [status.name for status in deployment.statuses()] == ["three", "two"]
    assert main(["stop", "--all", "--now"]) == 0
    assert main(["stop", "--all"]) == 0
    assert main(["stop", "one"]) == 1
    assert "no deployment or model 'one'" in capfd.readouterr().err


def test_list_clears_away_what_a_killed_one_left(
    stand_ins: StandIns, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = MIIServer(config())
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(cache))
    assert main(["list"]) == 0
    assert "cleared away what 'demo' had left" in capfd.readouterr().err


def test_a_deployment_with_a_damaged_config_can_be_stopped(stand_ins: StandIns) -> None:
    MIIServer(config())
    deployment_folder("demo").config_file.write_text("{")
    assert main(["stop", "demo"]) == 0
