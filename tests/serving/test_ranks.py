"""Replicas whose model is divided among processes: `mii.serve(model, tensor_parallel=2)` with every process real."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import mii
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError, ServingError
from mii.launch.state import read_state
from tests.parallel.test_sharded_models import NINE_HEADS
from tests.serving.deployments import free_port, pid_of, processes_of, wait_until

NAME = "ranks"
PROMPTS = ["DeepSpeed is", "Seattle is", "A"]


def state_of(role: str) -> tuple[str, int | None]:
    state = read_state(deployment_folder(NAME).state_file)
    process = next(process for process in state.processes if process.role == role) if state else None
    return (process.stage, process.pid) if process else ("", None)


def ask(client: mii.backend.MIIClient) -> None:
    with suppress(ServingError):  # its tokens are lost with the rank
        client.generate(PROMPTS, do_sample=False, max_new_tokens=6, timeout=60)


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> str:
    return str(make_checkpoint(**NINE_HEADS))


def test_two_replicas_of_two_ranks_answer_as_one_process_and_survive_the_death_of_a_rank(
    model: str, cache: Path
) -> None:
    with mii.pipeline(model, device="cpu", progress=False) as pipe:
        expected = [str(response) for response in pipe(PROMPTS, do_sample=False, max_new_tokens=12)]
    client = mii.serve(
        model,
        deployment_name=NAME,
        port_number=free_port(),
        device="cpu",
        replica_num=2,
        tensor_parallel=2,
        progress=False,
        max_restarts=3,
    )
    assert [str(answer) for answer in client.generate(PROMPTS, do_sample=False, max_new_tokens=12)] == expected
    before = {role: pid_of(deployment_folder(NAME), role) or 0 for role in ("replica-0-engine", "replica-0-engine-1")}
    os.kill(before["replica-0-engine-1"], signal.SIGKILL)
    started = time.monotonic()
    wait_until(lambda: state_of("replica-0-engine")[1] != before["replica-0-engine"], 10)
    assert time.monotonic() - started < 10
    assert [str(answer) for answer in client.generate(PROMPTS, do_sample=False, max_new_tokens=12)] == expected
    for role, pid in before.items():
        wait_until(lambda role=role, pid=pid: state_of(role)[0] == "ready" and state_of(role)[1] != pid, 120)
    assert [str(answer) for answer in client.generate(PROMPTS, do_sample=False, max_new_tokens=12)] == expected
    client.terminate_server()
    wait_until(lambda: not processes_of(cache))


@pytest.fixture
def one_head(make_checkpoint: Callable[..., Path]) -> str:
    return str(make_checkpoint(num_attention_heads=1))


def test_a_model_that_cannot_be_divided_so_says_why_and_leaves_nothing(one_head: str, cache: Path) -> None:
    with pytest.raises(DeploymentError, match=r"has 1 attention heads.*use 1 to 1"):
        mii.serve(
            one_head,
            deployment_name=NAME,
            port_number=free_port(),
            device="cpu",
            tensor_parallel=2,
            progress=False,
        )
    wait_until(lambda: not processes_of(cache))


def test_a_rank_that_hangs_ends_its_replica_within_ten_seconds(model: str, cache: Path) -> None:
    client = mii.serve(
        model,
        deployment_name=NAME,
        port_number=free_port(),
        device="cpu",
        tensor_parallel=2,
        progress=False,
        max_restarts=3,
    )
    expected = [str(answer) for answer in client.generate(PROMPTS, do_sample=False, max_new_tokens=6)]
    first, second = (pid_of(deployment_folder(NAME), role) or 0 for role in ("replica-0-engine", "replica-0-engine-1"))
    os.kill(second, signal.SIGSTOP)
    asked = threading.Thread(target=ask, args=(client,))
    asked.start()
    wait_until(lambda: state_of("replica-0-engine")[1] != first, 10)
    asked.join()
    for role, pid in (("replica-0-engine", first), ("replica-0-engine-1", second)):
        wait_until(lambda role=role, pid=pid: state_of(role)[0] == "ready" and state_of(role)[1] != pid, 120)
    assert [str(answer) for answer in client.generate(PROMPTS, do_sample=False, max_new_tokens=6)] == expected
    client.terminate_server()
    wait_until(lambda: not processes_of(cache))
