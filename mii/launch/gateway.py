"""The HTTP gateway of a deployment: ``python -m mii.launch.gateway <folder of the deployment> gateway``.

One process answers some ten thousand tokens a second. On machines with many cores there are several, up to the
config's `restful_processes`: copies of the first one, which listen on the same sockets and count into the same metrics.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mii.launch.loop import run
from mii.launch.process import Process

if TYPE_CHECKING:
    from mii.config import MIIConfig
    from mii.entrypoints.http.settings import HttpSettings

__all__ = ["main", "settings_of"]

_CHECK_SECONDS = 0.005


def main() -> None:
    """Answers HTTP until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing FastAPI")
        from mii.entrypoints.http.server import listen

        config = process.config
        run(serve(process, listen(config.restful_api_host, config.restful_api_port)))


async def serve(process: Process, sockets: Sequence[socket.socket]) -> None:
    """Answers on some sockets until a stop is requested, and lets what runs end.

    Args:
        process: this one.
        sockets: they are closed at the end.
    """
    from mii.entrypoints.http.server import HttpServer
    from mii.grpc_related.restful_gateway import create_app

    port = sockets[0].getsockname()[1]
    server = HttpServer(create_app(settings_of(process.config)), sockets, drain_seconds=process.drain_seconds)
    serving = asyncio.ensure_future(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(_CHECK_SECONDS)
    process.ready(http=port)
    stopping = asyncio.ensure_future(process.stopping())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.stop()
    await serving


def settings_of(config: MIIConfig) -> HttpSettings:
    """What the gateway of a deployment is told. Who may use it comes from the environment, see `read_api_keys`."""
    from mii.backend.channels import address_of
    from mii.entrypoints.http.settings import HttpSettings, read_api_keys

    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return HttpSettings(
        balancer=address_of(everywhere.get(config.host, config.host), config.port_number),
        model=config.model_conf.model_name_or_path,
        aliases=(config.deployment_name,),
        deployment=config.deployment_name,
        api_keys=read_api_keys(),
    )


if __name__ == "__main__":
    main()
