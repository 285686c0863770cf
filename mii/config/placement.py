"""Which device of which host, and which ports, each replica of a deployment gets.

A host has slots: its GPUs, or on a CPU deployment as many as the replicas need. A replica takes `tensor_parallel` slots
of one host; where no host has so many left, of several.

Example:
    >>> [p.devices for p in place_replicas("auto", {"node": 4}, replica_num=2, tensor_parallel=2)]
    [(0, 1), (2, 3)]
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mii.config.device_map import DEVICE_MAP_DEFAULT, DeviceMap
from mii.config.model import ModelConfig, ReplicaConfig
from mii.constants import HOSTFILE_DEFAULT, TORCH_DIST_PORT_STRIDE
from mii.errors import HostfileError, PlacementError

__all__ = [
    "Placement",
    "available_slots",
    "check_ports",
    "local_gpu_count",
    "make_replica_configs",
    "move_unasked_ports",
    "place_more",
    "place_replicas",
    "read_hostfile",
]

_HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_LAST_PORT = 65535


@dataclass(frozen=True)
class Placement:
    """Where one replica runs: a host, and the device of each of its processes. `hosts`: of each, where they differ."""

    host: str
    devices: tuple[int, ...]
    hosts: tuple[str, ...] = ()


def read_hostfile(path: str | os.PathLike[str]) -> dict[str, int]:
    """Slots per host, in the file's order. A line is ``host slots=N``; blank lines and ``#`` comments are skipped.

    Raises:
        HostfileError: the file cannot be read, has another kind of line, a host twice, or no host.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"the hostfile {path} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOSTFILE_LINE.fullmatch(text)
        if match is None:
            raise HostfileError(f"{path}, line {number}: {text!r} is not of the form 'host slots=N'")
        if match[1] in slots:
            raise HostfileError(f"{path}, line {number}: host {match[1]!r} is there twice; give it one line")
        slots[match[1]] = int(match[2])
    if not slots:
        raise HostfileError(f"the hostfile {path} names no host; add lines of the form 'host slots=N'")
    return slots


def local_gpu_count(visible: str | None) -> int:
    """NVIDIA GPUs that may be used: the driver's count, cut down by what is visible.

    Asks NVML, which takes milliseconds and leaves the GPUs untouched; without a driver the answer is 0.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``; None: it is not set.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return 0
    finally:
        nvml.nvmlShutdown()
    return _visible(count.value, visible)


def _visible(count: int, devices: str | None) -> int:
    """As CUDA reads it: entries after the first that names no device are ignored."""
    if devices is None:
        return count
    visible = 0
    for entry in devices.split(","):
        name = entry.strip()
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < count):
            break
        visible += 1
    return visible


def available_slots(hostfile: str | None, model: ModelConfig, visible: str | None) -> dict[str, int]:
    """Slots per host for `model`: the hostfile's, else this machine's GPUs, else one per process on its CPU.

    Args:
        hostfile: see `mii.config.MIIConfig`.
        model: how many processes are wanted.
        visible: see `local_gpu_count`.

    Raises:
        HostfileError: a hostfile was named and cannot be read.
        PlacementError: GPUs are asked for and there are none.
    """
    if hostfile is not None and (hostfile != HOSTFILE_DEFAULT or Path(hostfile).exists()):
        return read_hostfile(hostfile)
    gpus = 0 if model.device == "cpu" else local_gpu_count(visible)
    if gpus:
        return {"localhost": gpus}
    if model.device == "cuda":
        raise PlacementError("device='cuda' was asked for and this machine has no usable NVIDIA GPU; use device='cpu'")
    return {"localhost": max(model.replica_num * model.tensor_parallel, _highest_device(model.device_map) + 1)}


def _highest_device(device_map: str | DeviceMap) -> int:
    if isinstance(device_map, str):
        return -1
    return max((device for groups in device_map.values() for group in groups for device in group), default=-1)


def place_replicas(
    device_map: str | DeviceMap, slots: Mapping[str, int], replica_num: int, tensor_parallel: int
) -> list[Placement]:
    """A host and devices for each replica: as `device_map` says, or host by host from device 0 up for ``"auto"``, and
    then over several hosts from what each has left.

    Args:
        device_map: ``"auto"`` or {host: [[device of each process] of each replica]}.
        slots: devices of each host.
        replica_num: replicas to place.
        tensor_parallel: devices of each.

    Raises:
        PlacementError: there are too few devices; or the map has an unknown host, too few or too many groups, a group
            of the wrong size, a device that the host does not have, or one device twice.
    """
    if isinstance(device_map, str):
        assert device_map == DEVICE_MAP_DEFAULT, device_map
        placements = _automatic(slots, (), tensor_parallel)[:replica_num]  # whole ones first
    else:
        placements = _groups_of(device_map)
        _check_map(placements, slots, (), tensor_parallel)
    if len(placements) < replica_num:
        have = ", ".join(f"{host}: {count}" for host, count in slots.items())
        raise PlacementError(
            f"replica_num={replica_num} with tensor_parallel={tensor_parallel} needs {replica_num} groups of "
            f"{tensor_parallel} device(s); there is room for {len(placements)} (devices: {have}). "
            "Lower replica_num or tensor_parallel, or give more devices in device_map or the hostfile"
        )
    if len(placements) > replica_num:
        raise PlacementError(
            f"device_map has {len(placements)} groups of devices and replica_num is {replica_num}; make them equal"
        )
    return placements


def place_more(
    device_map: str | DeviceMap,
    slots: Mapping[str, int],
    taken: Sequence[Placement],
    count: int,
    tensor_parallel: int,
    added: DeviceMap | None = None,
) -> list[Placement]:
    """A host and devices for replicas that are added to others.

    Args:
        device_map: as the others were placed. The groups of a map that are free are taken in their order.
        slots: devices of each host.
        taken: where the others are.
        count: replicas to place.
        tensor_parallel: devices of each.
        added: devices for these replicas; None: those that are free.

    Raises:
        PlacementError: too few devices are free, or `added` has wrong ones.
    """
    if added is not None:
        placements = _groups_of(added)
        _check_map(placements, slots, taken, tensor_parallel)
        if len(placements) != count:
            raise PlacementError(
                f"device_map has {len(placements)} groups of devices and {count} replicas are added; give one for each"
            )
    elif isinstance(device_map, str):
        placements = _automatic(slots, taken, tensor_parallel)
    else:
        here = _devices_of(taken)
        placements = [group for group in _groups_of(device_map) if here.isdisjoint(_devices_of([group]))]
    if len(placements) < count:
        of = "the devices" if isinstance(device_map, str) else "the groups of device_map"
        have = ", ".join(f"{host}: {number}" for host, number in slots.items())
        raise PlacementError(
            f"{count} more replicas with tensor_parallel={tensor_parallel} do not fit: {len(taken)} run, and {of} that "
            f"are free have room for {len(placements)} (devices: {have}). Ask for {len(taken) + len(placements)} "
            "replicas at most, or give more devices in device_map or the hostfile"
        )
    return placements[:count]


def _automatic(slots: Mapping[str, int], taken: Sequence[Placement], tensor_parallel: int) -> list[Placement]:
    """All that fit on what is free: whole ones host by host, then those of what the hosts have left."""
    here, placements, left = _devices_of(taken), [], []
    for host, count in slots.items():
        free = [device for device in range(count) if (host, device) not in here]
        whole = len(free) - len(free) % tensor_parallel
        firsts = range(0, whole, tensor_parallel)
        placements += [Placement(host, tuple(free[first : first + tensor_parallel])) for first in firsts]
        left += [(host, device) for device in free[whole:]]
    for first in range(0, len(left) - tensor_parallel + 1, tensor_parallel):
        hosts, devices = zip(*left[first : first + tensor_parallel], strict=True)
        placements.append(Placement(hosts[0], devices, hosts))
    return placements


def _groups_of(device_map: DeviceMap) -> list[Placement]:
    return [Placement(host, tuple(group)) for host, groups in device_map.items() for group in groups]


def _devices_of(placements: Sequence[Placement]) -> set[tuple[str, int]]:
    return {
        (placement.hosts[rank] if placement.hosts else placement.host, device)
        for placement in placements
        for rank, device in enumerate(placement.devices)
    }


def _check_map(
    placements: Sequence[Placement], slots: Mapping[str, int], others: Sequence[Placement], tensor_parallel: int
) -> None:
    taken = _devices_of(others)
    for host, devices in ((placement.host, placement.devices) for placement in placements):
        where = f"device_map group {list(devices)} on host {host!r}"
        if host not in slots:
            raise PlacementError(f"{where}: no such host; known hosts: {', '.join(slots)}")
        if len(devices) != tensor_parallel:
            raise PlacementError(f"{where}: {len(devices)} device(s), but tensor_parallel is {tensor_parallel}")
        for device in devices:
            if device >= slots[host]:
                raise PlacementError(f"{where}: device {device} is not there; the host has {slots[host]}, from 0 up")
            if (host, device) in taken:
                raise PlacementError(f"{where}: device {device} is used twice; give each process a device of its own")
            taken.add((host, device))


def make_replica_configs(model: ModelConfig, port_number: int, placements: Sequence[Placement]) -> list[ReplicaConfig]:
    """A `ReplicaConfig` for each placement.

    Replica i of a deployment with tensor parallelism T answers on ports ``port_number + 1 + i T`` to
    ``port_number + (i + 1) T``; its other ports are the model's plus ``100 i`` (torch) and ``i`` (steps).

    Raises:
        PlacementError: a port would be above 65535.
    """
    tensor_parallel = model.tensor_parallel
    last = len(placements) - 1
    highest = {
        "port_number": port_number + len(placements) * tensor_parallel,
        "torch_dist_port": model.torch_dist_port + TORCH_DIST_PORT_STRIDE * last,
        "zmq_port_number": model.zmq_port_number + last,
    }
    for name, port in highest.items():
        if port > _LAST_PORT:
            raise PlacementError(f"{len(placements)} replicas take ports up to {port}; choose a lower {name}")
    first_ports = [port_number + 1 + index * tensor_parallel for index in range(len(placements))]
    return [
        ReplicaConfig(
            hostname=placement.host,
            rank_hosts=list(placement.hosts),
            tensor_parallel_ports=list(range(first_ports[index], first_ports[index] + tensor_parallel)),
            torch_dist_port=model.torch_dist_port + TORCH_DIST_PORT_STRIDE * index,
            gpu_indices=list(placement.devices),
            zmq_port=model.zmq_port_number + index,
        )
        for index, placement in enumerate(placements)
    ]


def move_unasked_ports(
    model: ModelConfig,
    named: Mapping[str, Sequence[int]],
    replicas: Sequence[ReplicaConfig],
    running: Sequence[ReplicaConfig] = (),
) -> None:
    """Moves the ports for torch and for steps, as far as nobody asked for them, up past what else the hosts use.

    Args:
        model: whose options say which ones were asked for.
        named: as for `check_ports`.
        replicas: from `make_replica_configs`; changed in place.
        running: replicas beside them, whose ports stay.
    """
    taken = {("localhost", port) for ports in named.values() for port in ports}
    taken |= {
        (replica.hostname or "localhost", port)
        for replica in (*replicas, *running)
        for port in replica.tensor_parallel_ports
    }
    taken |= {(replica.hostname or "localhost", port) for replica in running for port in replica.inner_ports}
    options = {"torch_dist_port": "torch_dist_port", "zmq_port_number": "zmq_port"}
    for option in sorted(options, key=model.model_fields_set.__contains__, reverse=True):  # those asked for first
        for replica in replicas:
            host, first = replica.hostname or "localhost", getattr(replica, options[option])
            if option not in model.model_fields_set:
                free = (port for port in range(first, _LAST_PORT + 1) if (host, port) not in taken)
                setattr(replica, options[option], next(free, first))
            taken.add((host, getattr(replica, options[option])))


def check_ports(named: Mapping[str, Sequence[int]], replicas: Sequence[ReplicaConfig]) -> None:
    """Refuses a deployment that would use one port for two things.

    Args:
        named: this machine's ports that are not a replica's, under the option that sets them.
        replicas: the replicas.

    Raises:
        PlacementError: names the port and its two uses.
    """
    uses = [("localhost", port, name) for name, ports in named.items() for port in ports]
    for index, replica in enumerate(replicas):
        ports = [(port, "gRPC port") for port in replica.tensor_parallel_ports]
        ports += [
            (port, name) for port, name in ((replica.torch_dist_port, "torch"), (replica.zmq_port, "zmq")) if port
        ]
        uses += [(replica.hostname or "localhost", port, f"{name} of replica {index}") for port, name in ports]
    first_use: dict[tuple[str, int], str] = {}
    for host, port, name in uses:
        if (host, port) in first_use:
            raise PlacementError(
                f"port {port} of {host} would be used twice: {first_use[host, port]} and {name}; move one of "
                "port_number, restful_api_port, torch_dist_port and zmq_port_number"
            )
        first_use[host, port] = name
