"""Replicas that others run, by their addresses. A name may stand for several, and for others a little later: that of a
headless service in Kubernetes stands for its pods.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mii.backend.channels import address_of
from mii.logging import logger

__all__ = ["end", "follow_addresses", "resolve"]

_LOOK_SECONDS = 2.0


async def follow_addresses(given: Sequence[str], take: Callable[[Sequence[str]], object]) -> None:
    """Looks addresses up, again and again until it is cancelled.

    Args:
        given: each as ``host:port``.
        take: gets all that they stand for, after each change.
    """
    known: dict[str, list[str]] = {address: [] for address in given}
    before: list[str] | None = None
    while True:
        for address in given:
            # A name that stands for nothing just now, or a name server that is away, is no reason to leave replicas
            # out that answer: those that do not are found out by asking them.
            known[address] = await resolve(address) or known[address]
        found = [replica for replicas in known.values() for replica in replicas]
        if found != before:
            logger.info("replicas: %s", ", ".join(found) or "none yet")
            take(found)
            before = found
        await asyncio.sleep(_LOOK_SECONDS)


async def resolve(address: str) -> list[str]:
    """What an address stands for now, sorted: of a name that has addresses of both kinds, those of version 4."""
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        logger.debug("%s: %s", address, error)
        return []
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return sorted({address_of(str(where[0]), int(where[1])) for family, *_, where in found if family == wanted})


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task, and returns when it has ended."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
