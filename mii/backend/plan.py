"""What a deployment consists of: the command, environment and cores of each of its processes.

Processes on this machine are started by the supervisor itself. For each one on another host it starts a stand-in, which
brings it up through DeepSpeed's launcher (see `mii.launch.remote`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

import mii
from mii.backend.cpus import cores_by_place, split_cores
from mii.config import MIIConfig
from mii.config.model import is_this_host
from mii.config.placement import local_gpu_count
from mii.errors import PlacementError
from mii.launch.folder import DeploymentFolder
from mii.launch.remote import check_launcher
from mii.launch.state import BALANCER, GATEWAY, Machine, Plan, Spec, engine_role, front_role

__all__ = ["make_plan", "python_environment", "this_machine"]

# Set by launchers around the caller; in a deployment's processes they would be somebody else's.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


def this_machine() -> Machine:
    """As this process sees it."""
    cores, threads = sorted(os.sched_getaffinity(0)), _THREADS in os.environ
    return Machine(sys.executable, mii.__version__, os.environ.get(_VISIBLE), cores, threads)


def make_plan(
    config: MIIConfig, folder: DeploymentFolder, *, attached: bool = False, machine: Machine | None = None
) -> Plan:
    """Every process of a deployment.

    Args:
        config: with its ports and replicas (see `mii.backend.ports.choose_ports`).
        folder: of the deployment.
        attached: see `Plan`.
        machine: what the deployment's processes see; None: what this one does.

    Raises:
        LauncherError: a replica is on another host and what starts processes there is missing.
        PlacementError: a replica is to have a GPU that this machine does not have.
    """
    machine = machine or this_machine()
    no_gpu: dict[str, str | None] = {_VISIBLE: ""}  # nothing but an engine ever touches one
    processes = [] if config.replica_only else [_python(folder, "load_balancer", BALANCER, no_gpu)]
    replicas = zip(config.model_conf.replica_configs, _devices(config, machine), strict=True)
    for index, (replica, ranks) in enumerate(replicas):
        module = "front" if replica.is_local else "remote"
        processes.append(_python(folder, module, front_role(index), no_gpu, index))
        for rank, where in enumerate(ranks):
            if where is None:
                check_launcher(config, replica.host_of(rank))
                processes.append(_engine(folder, index, rank, no_gpu, (), "remote"))
            else:
                processes.append(_engine(folder, index, rank, *where))
    if config.enable_restful_api:
        processes.append(_python(folder, "gateway", GATEWAY, no_gpu))
    processes = [msgspec.structs.replace(spec, command=[machine.python, *spec.command[1:]]) for spec in processes]
    return Plan(
        config.deployment_name,
        processes,
        float(config.drain_seconds),
        config.max_restarts,
        config.start_seconds,
        attached,
        machine,
    )


def python_environment(environment: Mapping[str, str]) -> dict[str, str | None]:
    """What the supervisor, and with it every process, needs on top of `environment` to import the same mii."""
    home = str(Path(__file__).parents[2])
    changes: dict[str, str | None] = dict.fromkeys(_LAUNCHER_VARIABLES)
    changes["PYTHONSAFEPATH"] = "1"  # files that happen to lie in the caller's folder are no modules
    changes["PYTHONUNBUFFERED"] = "1"
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if home not in installed and home not in paths:
        changes["PYTHONPATH"] = os.pathsep.join([home, *paths])
    return changes


_Place: TypeAlias = tuple[dict[str, str | None], list[int]]


def _engine(
    folder: DeploymentFolder,
    replica: int,
    rank: int,
    environment: dict[str, str | None],
    cores: Sequence[int],
    module: str = "engine",
) -> Spec:
    spec = _python(folder, module, engine_role(replica, rank), environment, replica, cores)
    return msgspec.structs.replace(spec, group=engine_role(replica))


def _devices(config: MIIConfig, machine: Machine) -> list[list[_Place | None]]:
    """What each rank of each replica's engine runs on: variables that say so, and cores (none: all of them).

    None for one on another host: its launcher sees to it.
    """
    replicas = config.model_conf.replica_configs
    gpus = 0 if config.model_conf.device == "cpu" else local_gpu_count(machine.visible)
    pool = _pool(gpus, machine.visible)
    size = config.model_conf.tensor_parallel
    engines = sum(is_this_host(replica.host_of(rank)) for replica in replicas for rank in range(size))
    shares = iter(split_cores(cores_by_place(machine.cores), max(1, engines)))
    devices: list[list[_Place | None]] = []
    for replica in replicas:
        places: list[_Place | None] = []
        for rank in range(size):
            if not is_this_host(replica.host_of(rank)):
                places.append(None)
                continue
            seen, own = replica.seen_by(rank)
            local_rank = {"LOCAL_RANK": str(own)} if size > 1 else {}
            if gpus:
                places.append(({_VISIBLE: _names(seen, pool), **local_rank}, []))
                continue
            cores = next(shares) if engines > 1 else []
            threads = {_THREADS: str(len(cores))} if cores and not machine.threads else {}
            places.append(({_VISIBLE: "", **threads, **local_rank}, cores))
        devices.append(places)
    return devices


def _pool(gpus: int, visible: str | None) -> list[str]:
    """The names of the GPUs that the caller may use, by the numbers that its device map gives them."""
    if visible is None:
        return [str(index) for index in range(gpus)]
    return [entry.strip() for entry in visible.split(",")][:gpus]


def _names(devices: Sequence[int], pool: Sequence[str]) -> str:
    """What CUDA_VISIBLE_DEVICES says for some devices."""
    missing = [device for device in devices if device >= len(pool)]
    if missing:
        raise PlacementError(
            f"a replica is to have GPUs {list(devices)} of this machine, which has {len(pool)} that may be used, "
            "from 0 up; correct the hostfile's slots, replica_configs or CUDA_VISIBLE_DEVICES"
        )
    return ",".join(pool[device] for device in devices)


def _python(
    folder: DeploymentFolder,
    module: str,
    role: str,
    environment: dict[str, str | None],
    replica: int | None = None,
    cpus: Sequence[int] = (),
) -> Spec:
    command = [sys.executable, "-m", f"mii.launch.{module}", str(folder.path), role]
    return Spec(role, command, environment, list(cpus), replica)
