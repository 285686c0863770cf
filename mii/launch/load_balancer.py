"""The load balancer's process: ``python -m mii.launch.load_balancer <folder of the deployment> balancer``."""

from __future__ import annotations

import gc

from mii.launch.loop import run
from mii.launch.process import Process


def main() -> None:
    """Serves the deployment until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing gRPC")
        import mii.grpc_related.balancer_server  # noqa: F401  before the loop runs, which it would hold up

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
    )
    port = await server.start(address_of(config.host, config.port_number))
    # What was made so far stays; without it in the collector's sight a collection is short.
    gc.collect()
    gc.freeze()
    process.report("waiting for a replica")
    await server.wait_ready()
    process.ready(grpc=port)
    await process.stopping()
    await server.stop(process.drain_seconds)


if __name__ == "__main__":
    main()
