"""What a deployment starts: commands without secrets, devices and cores of its own for each replica."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from mii.backend import plan
from mii.backend.cpus import cores_by_place, split_cores
from mii.backend.plan import make_plan, python_environment
from mii.config import MIIConfig
from mii.errors import LauncherError
from mii.launch import remote
from mii.launch.folder import DeploymentFolder
from mii.launch.state import Plan


def make(tmp_path: Path, model: dict[str, Any] | None = None, **options: Any) -> Plan:
    config = MIIConfig(model_config={"model_name_or_path": "m", "device": "cpu", **(model or {})}, **options)
    config.generate_replica_configs()
    return make_plan(config, DeploymentFolder(tmp_path))


def environments(made: Plan) -> dict[str, dict[str, str | None]]:
    return {spec.role: spec.environment for spec in made.processes}


def test_every_process_is_there_once_and_is_told_nothing_but_its_folder_and_role(tmp_path: Path) -> None:
    made = make(tmp_path, {"replica_num": 2}, enable_restful_api=True)
    assert {spec.role: spec.command[2:] for spec in made.processes} == {
        "balancer": ["mii.launch.load_balancer", str(tmp_path), "balancer"],
        "replica-0-front": ["mii.launch.front", str(tmp_path), "replica-0-front"],
        "replica-0-engine": ["mii.launch.engine", str(tmp_path), "replica-0-engine"],
        "replica-1-front": ["mii.launch.front", str(tmp_path), "replica-1-front"],
        "replica-1-engine": ["mii.launch.engine", str(tmp_path), "replica-1-engine"],
        "gateway": ["mii.launch.gateway", str(tmp_path), "gateway"],
    }
    assert all(spec.command[:2] == [sys.executable, "-m"] for spec in made.processes)
    assert [spec.replica for spec in made.processes] == [None, 0, 0, 1, 1, None]


def test_without_http_there_is_no_gateway(tmp_path: Path) -> None:
    assert "gateway" not in environments(make(tmp_path))


def test_replicas_on_the_cpu_get_cores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    monkeypatch.setattr(plan, "cores_by_place", lambda cores: list(cores))
    made = make(tmp_path, {"replica_num": 2})
    cpus = {spec.role: spec.cpus for spec in made.processes if spec.cpus}
    assert cpus == {"replica-0-engine": [0, 1], "replica-1-engine": [2, 3, 4]}
    assert environments(made)["replica-1-engine"] == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}


def test_a_single_replica_on_the_cpu_has_all_cores(tmp_path: Path) -> None:
    assert all(not spec.cpus and "OMP_NUM_THREADS" not in spec.environment for spec in make(tmp_path).processes)


def test_a_number_of_threads_that_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in environments(make(tmp_path, {"replica_num": 2}))["replica-0-engine"]


@pytest.mark.parametrize(
    ("visible", "device_map", "expected"),
    [
        (None, "auto", ["0", "1"]),
        ("5,3", "auto", ["5", "3"]),
        ("GPU-aa, GPU-bb", [[1], [0]], ["GPU-bb", "GPU-aa"]),
    ],
)
def test_each_replica_sees_its_own_gpus_of_those_that_the_caller_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, device_map: Any, expected: list[str]
) -> None:
    monkeypatch.setattr(plan, "local_gpu_count", lambda visible: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = MIIConfig(model_config={"model_name_or_path": "m", "replica_num": 2, "device_map": device_map})
    monkeypatch.setattr("mii.config.placement.local_gpu_count", lambda visible: 2)
    config.generate_replica_configs()
    found = environments(make_plan(config, DeploymentFolder(tmp_path)))
    assert [found[f"replica-{index}-engine"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == expected
    assert all(found[role]["CUDA_VISIBLE_DEVICES"] == "" for role in ("balancer", "replica-0-front"))


def test_processes_import_the_same_mii_and_nothing_from_the_callers_folder() -> None:
    home = str(Path(plan.__file__).parents[2])
    changes = python_environment({"PYTHONPATH": "/a:/b"})
    assert changes["PYTHONSAFEPATH"] == "1"
    installed = home in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    assert changes.get("PYTHONPATH") == (None if installed else f"{home}:/a:/b")
    assert "PYTHONPATH" not in python_environment({"PYTHONPATH": home})
    assert changes["WORLD_SIZE"] is None


@pytest.mark.parametrize(
    ("cores", "parts", "expected"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([4, 5, 6], 2, [[4], [5, 6]]),
        ([7], 1, [[7]]),
        ([0, 1], 3, [[0], [1], [0]]),
    ],
)
def test_cores_are_dealt_evenly(cores: list[int], parts: int, expected: list[list[int]]) -> None:
    assert split_cores(cores, parts) == expected


def test_hardware_threads_of_one_core_stay_together(tmp_path: Path) -> None:
    for cpu, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert cores_by_place(range(8), tmp_path) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert cores_by_place([9, 8], tmp_path) == [8, 9]


# ---------------------------------------------------------------- other hosts


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\nelsewhere slots=2\n")
    return str(path)


def two_hosts(hostfile: str, **options: Any) -> MIIConfig:
    model = {"model_name_or_path": "m", "replica_num": 2, "device_map": {"localhost": [[0]], "elsewhere": [[1]]}}
    config = MIIConfig(model_config=model, hostfile=hostfile, **options)
    config.generate_replica_configs()
    return config


def test_a_replica_on_another_host_goes_through_deepspeeds_launcher(hostfile: str, tmp_path: Path) -> None:
    config = two_hosts(hostfile, launcher="deepspeed --launcher slurm")
    assert remote.launcher_command(config, config.model_conf.replica_configs[1], "/shared/x.py") == [
        *("deepspeed", "--launcher", "slurm", "-H", hostfile, "-i", "elsewhere:1", "--master_addr", "elsewhere"),
        *("--master_port", "29600", "--no_ssh_check", "--no_local_rank", "--force_multi", "/shared/x.py"),
    ]


def test_a_launcher_that_is_missing_is_named_with_the_way_out(
    hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    needs = r"a replica on host 'elsewhere' needs '{}', which is not installed here; {}"
    for program, remedy in (("deepspeed", "pip install deepspeed"), ("ssh", "install an"), ("pdsh", "install it, or")):
        with pytest.raises(LauncherError, match=needs.format(program, remedy)):
            make_plan(two_hosts(hostfile), DeploymentFolder(tmp_path))
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    made = make_plan(two_hosts(hostfile), DeploymentFolder(tmp_path))
    modules = [(spec.replica, spec.command[2]) for spec in made.processes if spec.replica is not None]
    assert modules == [
        *((0, f"mii.launch.{what}") for what in ("front", "engine")),
        *((1, f"mii.launch.{what}") for what in ("remote", "remote")),
    ]


def test_of_a_replica_that_is_divided_over_hosts_each_process_is_where_its_device_is(
    hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "check_launcher", lambda config, host: None)
    monkeypatch.setattr(plan, "local_gpu_count", lambda visible: 1)
    config = MIIConfig(model_config={"model_name_or_path": "m", "tensor_parallel": 3}, hostfile=hostfile)
    config.generate_replica_configs()
    made = make_plan(config, DeploymentFolder(tmp_path), machine=plan.Machine(sys.executable, "1", "GPU-7", [0], False))
    engines = [spec for spec in made.processes if spec.replica == 0]
    assert [(spec.role, spec.command[2]) for spec in engines] == [
        ("replica-0-front", "mii.launch.front"),
        ("replica-0-engine", "mii.launch.engine"),
        ("replica-0-engine-1", "mii.launch.remote"),
        ("replica-0-engine-2", "mii.launch.remote"),
    ]
    assert engines[1].environment == {"CUDA_VISIBLE_DEVICES": "GPU-7", "LOCAL_RANK": "0"}
    (replica,) = config.model_conf.replica_configs
    command = remote.launcher_command(config, replica, "/shared/x.py", rank=2)
    assert command[command.index("-i") + 1] == "elsewhere:1"
