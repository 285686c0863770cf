"""The engine process of a replica: ``python -m mii.launch.engine <folder of the deployment> replica-<i>-engine``.

With tensor parallelism there is one for each rank; those after the first have ``-<rank>`` at the end of their role.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

from mii.backend.engine_server import EngineServer
from mii.backend.messages import EngineInfo
from mii.imports import importing
from mii.launch.loop import leave, settle
from mii.launch.process import Process
from mii.progress import report_progress_to

if TYPE_CHECKING:
    from mii.engine import Engine
    from mii.parallel.engines import FirstEngine

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def main() -> None:
    """Loads the model and serves it until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing torch")
        with importing():
            from mii.engine import load_engine

        report_progress_to(process.report)
        if process.model_config.tensor_parallel == 1:
            process.report("opening the checkpoint")
            serve(load_engine(process.model_config), process)
            return
        from mii.parallel.deployed import load_part
        from mii.parallel.engines import FirstEngine

        part = load_part(process)
        try:
            if isinstance(part, FirstEngine):
                serve(part, process)
            else:
                process.ready()
                part.follow()
        finally:
            part.destroy()


def serve(engine: Engine | FirstEngine, process: Process) -> None:
    """Says that the process is ready, and serves until a stop is requested."""
    with EngineServer(engine, describe(engine), process) as server:
        gc.collect()
        settle()
        process.ready()
        server.serve()


def describe(engine: Engine | FirstEngine) -> EngineInfo:
    """What a front must know of an engine."""
    import mii

    assert engine.runner is not None
    dtype = str(engine.runner.dtype).removeprefix("torch.")
    return EngineInfo(
        max_length=engine.max_length,
        vocab_size=engine.vocab_size,
        stop_ids=engine.stop_ids,
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        device=engine.runner.device.type,
        dtype=_DTYPES.get(dtype, dtype),
        version=mii.__version__,
        pid=os.getpid(),
    )


if __name__ == "__main__":
    main()
    leave()
