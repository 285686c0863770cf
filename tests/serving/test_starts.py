"""Deployments that are started and ended again and again leave nothing: no process, port, file or shared memory.

MII_STARTS says how often: 50 is what was asked for once, a few will do each time.
"""

from __future__ import annotations

import os
from pathlib import Path

import mii
from mii.backend.ports import is_free, ports_of
from tests.serving.deployments import free_port, processes_of, shared_memory, wait_until, without_owner

STARTS = int(os.environ.get("MII_STARTS", "2"))
NAME = "again"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_stays_of_deployments_that_have_ended(tiny_llama: Path, cache: Path) -> None:
    first, before, files = free_port(8), shared_memory(), []
    for _ in range(STARTS):
        client = mii.serve(
            str(tiny_llama), deployment_name=NAME, device="cpu", tensor_parallel=2, port_number=first, progress=False
        )
        assert client.generate("DeepSpeed is", max_new_tokens=4, ignore_eos=True)[0].generated_length == 4
        ports = ports_of(client.mii_config)
        client.terminate_server()
        wait_until(lambda: not processes_of(cache))
        assert [port for port in ports if not is_free(port)] == []
        assert [path for path in cache.rglob("*") if not path.is_dir()] == []
        files.append(open_files())
    wait_until(lambda: open_files() <= files[0] + 2, seen=lambda: (files, open_files()))
    wait_until(lambda: not without_owner(shared_memory() - before), seen=lambda: shared_memory() - before)
