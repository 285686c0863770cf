"""The HTTP gateway of a deployment: ``python -m mii.launch.gateway <folder of the deployment> gateway``.

One process answers with some tens of thousands of tokens a second. On machines with many cores, and where the config's
`restful_processes` asks for it, there are several: copies of the first one, among which the kernel spreads connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mii.imports import importing
from mii.launch.copies import Copies
from mii.launch.loop import run
from mii.launch.process import Process

if TYPE_CHECKING:
    from mii.config import MIIConfig
    from mii.entrypoints.http.server import HttpServer
    from mii.entrypoints.http.settings import HttpSettings
    from mii.launch.folder import DeploymentFolder

__all__ = ["main", "process_count", "settings_of"]

_CORES_A_PROCESS = 16
_MOST_PROCESSES = 8
_CHECK_SECONDS = 0.005
Sockets = Sequence[socket.socket]


def main() -> None:
    """Answers HTTP until a stop is requested."""
    with Process.from_arguments() as process:
        count = process_count(process.config, len(os.sched_getaffinity(0)))
        shares = _listen(process.config, count)
        if count > 1:
            _count_together(process)
        # They import what they need themselves: gRPC is not to be forked.
        copies = Copies([partial(_copy, process, shares, index) for index in range(1, count)])
        process.report("importing FastAPI")
        run(serve(process, _keep(shares, 0), copies))


async def serve(process: Process, sockets: Sockets, copies: Copies) -> None:
    """Answers on some sockets until a stop is requested, and lets what runs end.

    Args:
        process: this one.
        sockets: they are closed at the end.
        copies: of this process, which do the same.

    Raises:
        RuntimeError: a copy has ended by itself.
    """
    port = sockets[0].getsockname()[1]
    async with _serving(process, sockets) as server:
        await copies.wait_ready()
        process.ready(http=port)
        stopping, ended = asyncio.ensure_future(process.stopping()), asyncio.ensure_future(copies.wait_ended())
        await asyncio.wait((stopping, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise RuntimeError("one of the gateway's processes has ended; they start anew together")
        ended.cancel()
        await asyncio.wait((ended,))
        server.stop()
        await copies.stop(process.drain_seconds)


def process_count(config: MIIConfig, cores: int) -> int:
    """How many processes answer HTTP: as many as asked for and no more than there are cores, else by the cores."""
    if "restful_processes" in config.model_fields_set:
        return min(config.restful_processes, cores)
    return max(1, min(_MOST_PROCESSES, cores // _CORES_A_PROCESS))


def settings_of(config: MIIConfig, folder: DeploymentFolder) -> HttpSettings:
    """What the gateway of a deployment is told. Who may use it comes from the environment, see `read_api_keys`."""
    from mii.backend.channels import address_of
    from mii.entrypoints.http.settings import HttpSettings, read_api_keys

    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return HttpSettings(
        balancer=address_of(everywhere.get(config.host, config.host), config.port_number),
        socket=folder.calls_socket,
        model=config.model_conf.model_name_or_path,
        aliases=(config.deployment_name,),
        deployment=config.deployment_name,
        api_keys=read_api_keys(),
    )


def _copy(process: Process, shares: Sequence[Sockets], index: int, ready: Callable[[], None]) -> None:
    """What a copy does: it answers on its own share of the sockets until SIGTERM."""

    async def answer() -> None:
        async with _serving(process, _keep(shares, index)) as server:
            asked = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
            ready()
            await asked.wait()
            server.stop()

    run(answer())


@contextlib.asynccontextmanager
async def _serving(process: Process, sockets: Sockets) -> AsyncIterator[HttpServer]:
    """An HTTP server that answers while the block runs; when it has been stopped there, what runs may end."""
    with importing():
        from mii.entrypoints.http.server import HttpServer
        from mii.grpc_related.restful_gateway import create_app

    server = HttpServer(
        create_app(settings_of(process.config, process.folder)), sockets, drain_seconds=process.drain_seconds
    )
    serving = asyncio.ensure_future(server.serve())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(_CHECK_SECONDS)
        yield server
        await serving
    finally:
        serving.cancel()


def _listen(config: MIIConfig, count: int) -> list[Sockets]:
    """Sockets for each of so many processes."""
    from mii.entrypoints.http.server import listen

    host, port = config.restful_api_host, config.restful_api_port
    first = listen(host, port)  # refused where anybody else has the port
    if count == 1:
        return [first]
    for listener in first:
        listener.close()
    return [listen(host, port, shared=True) for _ in range(count)]


def _keep(shares: Sequence[Sockets], index: int) -> Sockets:
    """One process's share. The others' must be closed: the kernel would go on to spread connections to them."""
    for other, share in enumerate(shares):
        if other != index:
            for listener in share:
                listener.close()
    return shares[index]


def _count_together(process: Process) -> None:
    """Makes the metrics of all processes one. Works only before they are imported."""
    folder = process.folder.run / "metrics"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


if __name__ == "__main__":
    main()
