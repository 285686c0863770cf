"""`mii scale`: replicas are added to and taken from a deployment that runs. The supervisor does it (see
`mii.launch.rescale`); here is found out which, and where they go.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

import mii
from mii.backend.deployment import Status, describe_failure, find, find_alive, reserved_ports
from mii.backend.plan import make_plan
from mii.backend.ports import PortClaims, add_replicas
from mii.backend.startup import StartupView, startup_view
from mii.config import MIIConfig
from mii.config.device_map import DeviceMap, parse_device_map
from mii.config.placement import Placement, available_slots, place_more
from mii.config.registry import config_json, deployment_folder, registry_folder
from mii.errors import DeploymentError, PlacementError
from mii.launch.lock import locked
from mii.launch.state import Accepted, EventReader, Failure, Machine, Part, Plan, Refused, Scale, Scaled, read_plan

__all__ = ["scale"]

_ANSWER_SECONDS = 30.0


def scale(
    model_or_deployment_name: str, replicas: int, *, device_map: Any = None, progress: bool | None = None
) -> MIIConfig:
    """Gives a running deployment another number of replicas, and returns when it has them.

    Replicas are added on devices that are free. The last ones are taken away: they get no more requests, and what they
    have may end within `drain_seconds`. Replicas that were given up are started again.

    Args:
        model_or_deployment_name: which deployment.
        replicas: how many it is to have, from 1 up.
        device_map: devices of those that are added, as `mii.serve` takes them; None: those that are free.
        progress: show how far new replicas are; None: on a terminal and where it is not, as lines.

    Returns:
        The deployment's config with the replicas that it has now.

    Raises:
        DeploymentNotFoundError: there is none.
        PlacementError: fewer than one are asked for, or the devices that are free are too few.
        HostfileError: the deployment's hostfile cannot be read any more.
        DeploymentError: the deployment cannot be changed now, or a new replica did not start; says why. The deployment
            goes on with the replicas that it had.
    """
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
        raise PlacementError(
            f"replicas is {replicas!r}; a deployment has one at least: "
            f"'mii stop \"{model_or_deployment_name}\"' ends it"
        )
    added = None if device_map is None else parse_device_map(device_map)
    if isinstance(added, str):
        added = None
    status = find_alive(model_or_deployment_name)
    view = startup_view(progress)
    try:
        with _Request(status) as request:
            with locked(registry_folder() / ".lock"):
                config = request.send(replicas, added)
            request.wait(view)
        view.note(f"deployment {status.name!r} has {replicas} replica{'s' if replicas > 1 else ''}")
    finally:
        view.close()
    return config


class _Request:
    """One request to the supervisor of a deployment."""

    def __init__(self, status: Status) -> None:
        self._name, self._status = status.name, status
        self._folder = deployment_folder(status.name)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(_ANSWER_SECONDS)
        self._events = EventReader(self._connection)
        self._claims = PortClaims()

    def __enter__(self) -> _Request:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._claims.release()

    def send(self, replicas: int, added: DeviceMap | None) -> MIIConfig:
        """Returns once the supervisor has begun, and other deployments see the new ports."""
        plan = self._plan()
        assert plan.machine is not None
        config = self._resized(replicas, added, plan.machine)
        new = make_plan(config, self._folder, attached=plan.attached, machine=plan.machine)
        try:
            self._connection.connect(str(self._folder.control_socket))
            self._connection.sendall(msgspec.json.encode(Scale(new, config_json(config))) + b"\n")
            said = self._events.next()
        except OSError as error:
            raise self._error(f"its supervisor does not answer: {error}") from error
        if not isinstance(said, Accepted):
            raise self._error(said.reason if isinstance(said, Refused) else "it has ended")
        return config

    def wait(self, view: StartupView) -> None:
        """Until it is done."""
        self._connection.settimeout(None)
        for event in self._events:
            if isinstance(event, Part):
                view.show(event)
            elif isinstance(event, Scaled):
                return
            elif isinstance(event, Refused):
                raise self._error(event.reason)
            elif isinstance(event, Failure):
                text = describe_failure(self._name, f"{event.reason}; it has the replicas that it had", event.log)
                raise DeploymentError(text)
        raise self._error("it has ended")

    def _plan(self) -> Plan:
        """As the deployment was started."""
        if self._status.stage != "running":
            raise self._error(f"it is {self._status.stage}; replicas can be added and taken away while it is running")
        if self._status.config.replica_only or self._status.config.replica_addresses:
            raise self._error("its replicas are run by others, or it is one of those; add and take them away there")
        plan = read_plan(self._folder.plan_file)
        version = plan.machine.version if plan.machine else "another version"
        if version != mii.__version__:
            raise self._error(f"mii {version} runs it and this is {mii.__version__}; use the same, or start it anew")
        return plan

    def _resized(self, replicas: int, added: DeviceMap | None, machine: Machine) -> MIIConfig:
        config = find(self._name).config  # as it is now that nobody else changes it
        model = config.model_conf
        more = replicas - len(model.replica_configs)
        if added is not None and more <= 0:
            raise PlacementError(
                f"device_map is for replicas that are added, and {replicas} are none more; leave it out"
            )
        configs = model.replica_configs[:replicas]
        changes: dict[str, Any] = {"replica_num": replicas}
        if more > 0:
            configs = add_replicas(config, self._place(config, more, added, machine), reserved_ports(), self._claims)
        if added is not None and isinstance(model.device_map, dict):
            changes["device_map"] = _joined(model.device_map, added)
        changes["replica_configs"] = configs
        return config.model_copy(update={"model_conf": model.model_copy(update=changes)})

    def _place(self, config: MIIConfig, more: int, added: DeviceMap | None, machine: Machine) -> list[Placement]:
        model = config.model_conf
        taken = [
            Placement(replica.hostname or "localhost", tuple(replica.gpu_indices), tuple(replica.rank_hosts))
            for replica in model.replica_configs
        ]
        wanted = model.model_copy(update={"replica_num": len(taken) + more, "device_map": added or model.device_map})
        slots = available_slots(config.hostfile, wanted, machine.visible)
        return place_more(model.device_map, slots, taken, more, model.tensor_parallel, added)

    def _error(self, why: str) -> DeploymentError:
        return DeploymentError(f"the replicas of deployment {self._name!r} cannot be changed: {why}")


def _joined(device_map: DeviceMap, added: DeviceMap) -> DeviceMap:
    hosts = dict.fromkeys([*device_map, *added])
    return {host: [*device_map.get(host, []), *added.get(host, [])] for host in hosts}
