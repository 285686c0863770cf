"""Which devices the replicas of a deployment run on, in the forms that users write it.

Example:
    >>> parse_device_map([[0, 1], [2, 3]])
    {'localhost': [[0, 1], [2, 3]]}
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEVICE_MAP_DEFAULT", "DeviceMap", "parse_device_map"]

DEVICE_MAP_DEFAULT = "auto"

# {host: [[device of each process] of each replica]}
DeviceMap = dict[str, list[list[int]]]


def parse_device_map(value: Any) -> str | DeviceMap:
    """A device map in its full form, or ``"auto"``.

    Args:
        value: ``"auto"``; a device; the devices of one replica; a list of these for several replicas; or a dict of
            such lists by host. Without a host it is ``localhost``.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, str):
        if value != DEVICE_MAP_DEFAULT:
            raise ValueError("a device map given as a string must be 'auto'; devices are numbers, as in [0, 1]")
        return value
    if isinstance(value, dict):
        if not value:
            raise ValueError("names no host; give {'localhost': [[0, 1]]} or 'auto'")
        return {_host(host): _groups(groups) for host, groups in value.items()}
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple)):
        return {"localhost": _groups([value])}
    return {"localhost": _groups(value if isinstance(value, (list, tuple)) else [[value]])}


def _host(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no host name; give a dict such as {{'localhost': [[0, 1]]}}")
    return value


def _groups(value: Any) -> list[list[int]]:
    if (
        not isinstance(value, (list, tuple))
        or not value
        or not all(isinstance(group, (list, tuple)) for group in value)
    ):
        raise ValueError(f"{value!r} must be one list of devices for each replica, as in [[0, 1], [2, 3]]")
    return [_group(group) for group in value]


def _group(value: list[Any] | tuple[Any, ...]) -> list[int]:
    if not value:
        raise ValueError("a replica has no device; give one device for each of its processes, as in [[0, 1]]")
    for device in value:
        if isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise ValueError(f"{device!r} is no device; devices are numbers from 0 up")
    return list(value)
