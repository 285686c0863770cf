"""`mii.serve` and `mii.client` with every process real, on a model of two layers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mii
from mii.backend import deployment
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError, DeploymentNotFoundError, MIIError
from mii.launch.state import read_state
from tests.serving.deployments import pid_of, processes_of, wait_until

NAME = "a name/with both"
PROMPTS = ["DeepSpeed is", "Seattle is"]
ROLES = ["replica-0-engine", "replica-0-front", "balancer", "gateway"]


def ready_again(role: str, killed: int) -> bool:
    state = read_state(deployment_folder(NAME).state_file)
    process = next(process for process in state.processes if process.role == role) if state else None
    return process is not None and process.stage == "ready" and process.pid != killed


def test_it_answers_like_the_pipeline_here_and_in_other_processes_and_ends(tiny_llama: Path, cache: Path) -> None:
    with mii.pipeline(str(tiny_llama), device="cpu") as pipe:
        expected = [response.generated_text for response in pipe(PROMPTS, do_sample=False, max_new_tokens=12)]
    client = mii.serve(str(tiny_llama), deployment_name=NAME, device="cpu", replica_num=2, progress=False)
    answers = client.generate(PROMPTS, do_sample=False, max_new_tokens=12)
    assert [answer.generated_text for answer in answers] == expected
    script = "import mii, sys; client = mii.client(sys.argv[1]); "
    script += f"print(client.generate({PROMPTS!r}, do_sample=False, max_new_tokens=12)[1].generated_text, end='')"
    other = subprocess.run([sys.executable, "-c", script, NAME], capture_output=True, text=True, check=True)
    assert other.stdout == expected[1]
    assert len(os.sched_getaffinity(pid_of(deployment_folder(NAME), "replica-1-engine") or 0)) <= max(
        1, (len(os.sched_getaffinity(0)) + 1) // 2
    )
    client.terminate_server()
    wait_until(lambda: not processes_of(cache))
    with pytest.raises(DeploymentNotFoundError):
        mii.client(NAME)


def test_it_survives_the_death_of_each_of_its_processes(tiny_llama: Path, cache: Path) -> None:
    client = mii.serve(
        str(tiny_llama), deployment_name=NAME, device="cpu", progress=False, enable_restful_api=True, max_restarts=2
    )
    expected = client.generate(PROMPTS[0], do_sample=False, max_new_tokens=8)[0].generated_text
    for role in ROLES:
        killed = pid_of(deployment_folder(NAME), role) or 0
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda role=role, killed=killed: ready_again(role, killed), 60)
        assert answer_within(10, lambda: client.generate(PROMPTS[0], do_sample=False, max_new_tokens=8)) == expected
    client.terminate_server()
    wait_until(lambda: not processes_of(cache))


def answer_within(seconds: float, ask: Callable[[], list[mii.batching.data_classes.Response]]) -> str:
    """The answer's text; errors in between are fine, an answer must come in this time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()[0].generated_text
        except MIIError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_folder_without_a_model_is_named_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(DeploymentError) as caught:
        mii.serve(str(tmp_path / "model"), deployment_name=NAME, device="cpu", progress=False)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"deployment {NAME!r} failed: replica-0-") and str(tmp_path / "model") in first


def test_ctrl_c_while_the_model_loads_leaves_nothing(tiny_llama: Path, cache: Path) -> None:
    script = "import mii, sys; mii.serve(sys.argv[1], deployment_name=sys.argv[2], device='cpu')"
    command = [sys.executable, "-c", script, str(tiny_llama), NAME]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "importing torch" not in process.stderr.readline():
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    assert time.monotonic() - started < 10
    assert processes_of(cache) == {}


def test_the_deployment_runs_on_after_its_script_and_mii_stop_ends_it(tiny_llama: Path, cache: Path) -> None:
    script = "import mii, sys; mii.serve(sys.argv[1], deployment_name=sys.argv[2], device='cpu', progress=False)"
    subprocess.run([sys.executable, "-c", script, str(tiny_llama), NAME], check=True)
    assert deployment.find(NAME).stage == "running"
    assert mii.client(NAME).generate(PROMPTS[0], max_new_tokens=3, ignore_eos=True)[0].generated_length == 3
    subprocess.run([sys.executable, "-m", "mii", "stop", NAME], check=True)
    assert processes_of(cache) == {}
