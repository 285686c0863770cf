"""The load balancer's process: ``python -m mii.launch.load_balancer <folder of the deployment> balancer``."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from mii.imports import importing
from mii.launch.addresses import end, follow_addresses
from mii.launch.loop import run, settle
from mii.launch.process import Process

if TYPE_CHECKING:
    from mii.grpc_related.balancer_server import BalancerServer


def main() -> None:
    """Serves the deployment until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing gRPC")
        with importing():  # before the loop runs, which it would hold up
            import mii.grpc_related.balancer_server  # noqa: F401

        run(serve(process))


async def serve(process: Process) -> None:
    """Listens, serves, drains."""
    from mii.backend.channels import address_of
    from mii.grpc_related.balancer_server import BalancerServer

    config = process.config
    server = BalancerServer(
        [replica.address for replica in config.model_conf.replica_configs],
        queue_size=config.queue_size,
        token=process.token,
        terminate=process.stop_deployment,
        folder=process.folder,
    )
    port = await server.start(address_of(config.host, config.port_number))
    changes = await _follow(process, server)
    settle()
    process.waiting("waiting for a replica")
    await server.wait_ready()
    process.ready(grpc=port)
    await process.stopping()
    await changes.aclose()
    await server.stop(process.drain_seconds)


async def _follow(process: Process, server: BalancerServer) -> AsyncExitStack:
    """Takes in which replicas there are, now and whenever it changes, until what is returned is closed."""
    from mii.config import MIIConfig

    stack = AsyncExitStack()
    if process.config.replica_addresses:
        looking = asyncio.ensure_future(follow_addresses(process.config.replica_addresses, server.set_replicas))
        stack.push_async_callback(end, looking)
        return stack

    def look() -> None:
        config = MIIConfig.model_validate_json(process.folder.config_file.read_bytes())
        server.set_replicas([replica.address for replica in config.model_conf.replica_configs])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        look()
        await server.wait_all_ready()
        writer.write(b"x")
        writer.close()

    path = process.folder.balancer_socket
    path.unlink(missing_ok=True)  # of an earlier load balancer
    stack.callback((await asyncio.start_unix_server(answer, path)).close)
    look()
    return stack


if __name__ == "__main__":
    main()
