"""`mii scale` on a machine with two GPUs: a replica comes onto the free one, answers, and gives its memory back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mii
from mii import cli
from mii.backend import MIIClient
from tests.gpu.test_ranks import OPTIONS
from tests.serving.conftest import cache
from tests.serving.deployments import free_port, processes_of, wait_until

__all__ = ["cache"]

NAME, SLACK = "scaled", 64 << 20


def taken(index: int, before: int) -> int:
    """Bytes of a GPU that were free before."""
    return before - torch.cuda.mem_get_info(index)[0]


def answers(client: MIIClient) -> list[str]:
    given = client.generate(["A", "B"], do_sample=False, max_new_tokens=6, ignore_eos=True)
    assert given is not None
    return [str(answer) for answer in given]


def test_a_replica_comes_onto_the_second_gpu_and_leaves_it_empty(
    make_checkpoint: Callable[..., Path], cache: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    torch.cuda.mem_get_info(1)  # this process's own context
    before = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    options: dict[str, Any] = {"device": "cuda", "memory_fraction": 0.1, "progress": False}
    model = str(make_checkpoint(**OPTIONS))
    client = mii.serve(model, deployment_name=NAME, port_number=free_port(), device_map=[[0]], **options)
    expected = answers(client)
    assert taken(0, before[0]) > SLACK
    assert taken(1, before[1]) < SLACK
    assert cli.main(["scale", NAME, "2", "--device-map", "[[1]]"]) == 0
    assert taken(1, before[1]) > SLACK
    for _ in range(4):
        assert answers(client) == expected
    assert cli.main(["scale", NAME, "1"]) == 0
    deadline = time.monotonic() + 20
    while taken(1, before[1]) > SLACK:
        assert time.monotonic() < deadline, f"{taken(1, before[1])} bytes are still taken"
        time.sleep(0.1)
    assert answers(client) == expected
    client.terminate_server()
    wait_until(lambda: not processes_of(cache))
