"""A replica on another host, through a launcher that stands in for DeepSpeed's and runs what it is given right here."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mii.backend.server import MIIServer
from mii.config import MIIConfig
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError
from mii.launch import remote
from mii.launch.process import Process
from tests.serving.deployments import free_port, pid_of, processes_of, wait_until

# Like the real one it goes on until its process ends and fails when that fails; and it must never be told to end.
LAUNCHER = """#!{python}
import os, signal, subprocess, sys
print("launcher was given", sys.argv[1:], flush=True)
child = subprocess.Popen([sys.executable, sys.argv[-1]])
signal.signal(signal.SIGTERM, lambda *_: print("launcher was told to end", flush=True))
sys.exit(abs(child.wait()))
"""


SSH = """#!/bin/sh
for last; do :; done
exec sh -c "$last"
"""


@pytest.fixture
def other_host(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address of this machine that no config takes for this machine, and programs that seem to reach it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("deepspeed", "ssh", "pdsh"):
        (programs / name).write_text(SSH if name == "ssh" else LAUNCHER.format(python=sys.executable))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\n")
    return str(tmp_path / "hosts")


def config(model: Path, hostfile: str, **options: Any) -> MIIConfig:
    options = {"deployment_name": "demo", "hostfile": hostfile, "port_number": free_port(), **options}
    return MIIConfig(model_config={"model_name_or_path": model, "device": "cpu", "progress": False}, **options)


def log_of(role: str) -> str:
    return deployment_folder("demo").log(role).read_text()


def test_it_answers_comes_back_when_it_dies_and_ends(other_host: str, tiny_llama: Path, cache: Path) -> None:
    from mii.backend import MIIClient

    server = MIIServer(config(tiny_llama, other_host), attached=True)
    (replica,) = server.mii_config.model_conf.replica_configs
    assert (replica.hostname, replica.is_local) == ("127.0.0.2", False)
    for role in ("replica-0-front", "replica-0-engine"):
        assert f"launcher was given ['-H', '{other_host}', '-i', '127.0.0.2:0', " in log_of(role)
    with MIIClient(server.mii_config) as client:
        assert client.generate("DeepSpeed is", max_new_tokens=4, ignore_eos=True)[0].generated_length == 4
    os.kill(pid_of(deployment_folder("demo"), "replica-0-front") or 0, signal.SIGKILL)
    notices = server.notices()
    assert "replica-0-front was killed by SIGKILL; starting it again" in next(notices)
    assert next(notices) == "replica-0-front is back"
    server.terminate()
    wait_until(lambda: not processes_of(cache))


def test_a_process_that_fails_there_fails_here(other_host: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(DeploymentError, match=r"on host '127\.0\.0\.2': .* has no (config\.json|weights|tokenizer)"):
        MIIServer(config(tmp_path / "model", other_host))
    wait_until(lambda: not processes_of(cache))


def test_the_script_for_the_other_host_is_in_the_deployments_folder(cache: Path, tmp_path: Path) -> None:
    folder = deployment_folder("demo")
    folder.path.mkdir(parents=True)
    folder.create()
    config_file = {"model_config": {"model_name_or_path": "m", "replica_configs": [{"tensor_parallel_ports": [1]}]}}
    folder.config_file.write_text(json.dumps(config_file))
    path = Path(remote.write_script(Process(folder.path, "replica-0-front"), tmp_path / "sign"))
    assert path.parent == folder.path
    compile(path.read_text(), str(path), "exec")
    folder.remove()
