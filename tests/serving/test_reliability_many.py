"""Deployments side by side, one after the other, and with many programs at once: each is itself, none leaves a trace.

MII_TEST_STARTS says how often a deployment is started and stopped (2 unless set).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import msgspec
import pytest

import mii
from mii.backend import MIIClient
from mii.config.registry import deployment_folder, deployment_names
from mii.errors import DeploymentNotFoundError
from mii.launch.state import read_state
from tests.serving.clusters import running_cluster
from tests.serving.crowd import http_options, stand_in_text
from tests.serving.deployments import processes_of, shared_memory, wait_until, without_owner
from tests.serving.standin import Options

STARTS = int(os.environ.get("MII_TEST_STARTS", "2"))
NAMES = ("a name, with/slashes & spaces", "a name, with/slashes")
OPTIONS = {"do_sample": False, "max_new_tokens": 12}


def over_http(client: MIIClient, prompt: str) -> str:
    config = client.mii_config
    url = f"http://127.0.0.1:{config.restful_api_port}/mii/{quote(config.deployment_name)}"
    body = msgspec.json.encode({"prompts": [prompt], **OPTIONS})
    request = Request(url, body, {"Content-Type": "application/json"})
    with build_opener(ProxyHandler({})).open(request, timeout=30) as reply:
        return str(msgspec.json.decode(reply.read())[0]["generated_text"])


@pytest.fixture(scope="module")
def models(make_checkpoint: Callable[..., Path]) -> dict[Path, str]:
    """Two models, and what the pipeline answers with each."""
    found = {}
    for model in (make_checkpoint(), make_checkpoint(seed=1)):
        with mii.pipeline(str(model), device="cpu") as pipe:
            found[model] = pipe("DeepSpeed is", **OPTIONS)[0].generated_text
    return found


def test_two_deployments_side_by_side(models: dict[Path, str], cache: Path) -> None:
    paths, expected = list(models), list(models.values())
    assert expected[0] != expected[1]

    def serve(index: int) -> MIIClient:
        options = {"device": "cpu", "progress": False, "memory_fraction": 0.02, **http_options()}
        return mii.serve(str(paths[index]), deployment_name=NAMES[index], **options)

    with ThreadPoolExecutor() as pool:
        clients = list(pool.map(serve, range(2)))
    assert deployment_names() == sorted(NAMES)
    ports = [port for name in NAMES for port in ports_of(name)]
    assert len(set(ports)) == len(ports) == 6
    for client, text in zip(clients, expected, strict=True):
        assert client.generate("DeepSpeed is", **OPTIONS)[0].generated_text == text
        assert over_http(client, "DeepSpeed is") == text
    clients[0].terminate_server()
    with pytest.raises(DeploymentNotFoundError):
        mii.client(NAMES[0])
    assert mii.client(NAMES[1]).generate("DeepSpeed is", **OPTIONS)[0].generated_text == expected[1]
    assert over_http(clients[1], "DeepSpeed is") == expected[1]
    clients[1].terminate_server()


def ports_of(name: str) -> list[int]:
    state = read_state(deployment_folder(name).state_file)
    return [port for process in state.processes for port in process.ports.values()] if state else []


def held() -> Counter[str]:
    """What this process has that a deployment might leave behind."""
    threads = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    return threads + Counter(descriptors=len(list(Path("/proc/self/fd").iterdir())))


def test_starting_and_stopping_again_and_again_leaves_nothing(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, memory = Counter[str](), shared_memory()
    for turn in range(STARTS + 1):
        if turn == 1:  # the first turn makes what a process makes once
            before = held()
        with running_cluster(monkeypatch, tiny_llama, replicas=1, options=Options(), **http_options()) as cluster:
            ports = ports_of(cluster.config.deployment_name)
            assert len(ports) == 3
            (answer,) = cluster.client.generate("again", max_new_tokens=4)
            assert answer.generated_text == stand_in_text("again", 4)
        assert processes_of(cache) == {}
        assert deployment_names() == []
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
    wait_until(lambda: held() <= before, seen=lambda: held() - before)
    wait_until(lambda: not without_owner(shared_memory() - memory), seen=lambda: shared_memory() - memory)


# As the client of DeepSpeed-MII's own benchmark: processes with threads that each make a client for every request.
BENCHMARK_CLIENT = """
import asyncio, sys, threading
import mii

def work(number):
    asyncio.set_event_loop(asyncio.new_event_loop())
    for turn in range(5):
        client, texts, prompt = mii.client(sys.argv[1]), [], f"client-{sys.argv[2]}-{number}-{turn}"
        note = lambda response: texts.append(response[0].generated_text)
        client.generate(prompt, max_new_tokens=6, streaming_fn=note)
        whole = client.generate(prompt, max_new_tokens=6)[0].generated_text
        assert whole == "".join(texts)
        lines.append(f"{prompt} {whole}")  # to print here would mix what the threads say

lines = []
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("\\n".join(lines))
"""


def test_the_clients_of_mii_s_own_benchmark(tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(step_seconds=0.002)
    with running_cluster(monkeypatch, tiny_llama, replicas=2, options=options) as cluster:
        command = [sys.executable, "-c", BENCHMARK_CLIENT, cluster.config.deployment_name]
        processes = [
            subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(2)
        ]
        answers = [line.split() for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
        assert [process.returncode for process in processes] == [0, 0]
        assert len(answers) == 2 * 4 * 5
        assert all(text == stand_in_text(prompt, 6) for prompt, text in answers)
        cluster.wait_idle()
