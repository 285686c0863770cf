"""The front process of a replica: ``python -m mii.launch.front <folder of the deployment> replica-<i>-front``.

It speaks gRPC, tokenises and detokenises; the engine is a process of its own (`mii.launch.engine`). It never imports
torch.
"""

from __future__ import annotations

from mii.imports import importing
from mii.launch.loop import run, settle
from mii.launch.process import Process


def main() -> None:
    """Serves the replica until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing gRPC")
        with importing():  # before the loop runs, which it would hold up
            import mii.grpc_related.replica_server
            import mii.modeling.tokenizers  # noqa: F401

        run(serve(process))


async def serve(process: Process) -> None:
    """Comes up with the engine, serves, drains."""
    from mii.grpc_related.replica_server import ReplicaServer
    from mii.grpc_related.text_session import TextSession
    from mii.modeling.tokenizers import load_tokenizer

    config, model = process.config, process.model_config
    process.report("loading the tokenizer")
    tokenizer = load_tokenizer(model.tokenizer, revision=model.revision, trust_remote_code=model.trust_remote_code)
    session = TextSession(
        tokenizer,
        process.engine_address,
        max_length=model.max_length,
        seed=model.seed,
        queue_size=config.queue_size,
        silence_seconds=float(config.silence_seconds),
    )
    server = ReplicaServer(
        session,
        queue_size=config.queue_size,
        token=process.token,
        terminate=process.stop_deployment,
        folder=process.folder,
    )
    port = await server.start(process.listen_host, process.replica_config.tensor_parallel_ports[0])
    process.waiting("waiting for the engine")
    await session.wait_ready()
    settle()
    process.ready(grpc=port)
    await process.stopping()
    await server.stop(process.drain_seconds)


if __name__ == "__main__":
    main()
