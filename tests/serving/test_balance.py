"""A load balancer and HTTP over replicas that others run: `mii serve --replica-only` and `mii balance`."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import mii
from mii.config import MIIConfig
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError
from mii.launch import addresses
from mii.launch.state import read_state
from tests.serving.deployments import free_port, processes_of, wait_until

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mii", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def stage(name: str) -> str:
    state = read_state(deployment_folder(name).state_file)
    return state.stage if state else ""


def status_of(url: str) -> int:
    try:
        return httpx.get(url, timeout=30).status_code
    except httpx.TransportError:
        return 0


def serves(port: int) -> bool:
    """As the probe of a pod asks."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_replicas_and_load_balancer_that_are_started_apart_find_each_other_and_survive_each_other(
    tiny_llama: Path, cache: Path
) -> None:
    first = free_port(6)
    http, balancer, ports = first, first + 1, (first + 2, first + 3)
    where = ",".join(f"localhost:{port}" for port in ports)
    front = start("balance", "org/model", "--replicas", where, "--name", "front", "--port", str(balancer),
                  "--http", "--http-port", str(http))  # fmt: skip
    wait_until(lambda: status_of(f"http://127.0.0.1:{http}/livez") == 200, 60)
    assert status_of(f"http://127.0.0.1:{http}/health") == 503  # nobody is there yet
    model = ["serve", str(tiny_llama), "--device", "cpu", "--dtype", "fp32", "--replica-only"]
    replicas = [start(*model, "--name", f"replica-{port}", "--port", str(port)) for port in ports]
    wait_until(lambda: all(map(serves, ports)), 90)
    wait_until(lambda: stage("front") == "running", 60)
    with mii.client(f"replica-{ports[0]}") as alone, mii.client("front") as client:
        expected = str(alone.generate("DeepSpeed is", **OPTIONS)[0])
        wait_until(lambda: [replica["ready"] for replica in client.health()["replicas"]] == [True, True])
        assert [str(answer) for answer in client.generate(["DeepSpeed is"] * 4, **OPTIONS)] == [expected] * 4
        body = {"model": "org/model", "prompt": "DeepSpeed is", "max_tokens": 6, "temperature": 0}
        reply = httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["text"] == expected
        assert {entry["name"] for entry in json.loads(_list())} == {"front", *(f"replica-{port}" for port in ports)}
        with pytest.raises(DeploymentError, match="its replicas are run by others, or it is one of those"):
            client.scale(2)
        replicas[0].send_signal(signal.SIGTERM)
        assert replicas[0].wait(60) == 0
        assert [str(answer) for answer in client.generate(["DeepSpeed is"] * 4, **OPTIONS)] == [expected] * 4
        replicas[1].send_signal(signal.SIGTERM)
        assert replicas[1].wait(60) == 0
        wait_until(lambda: status_of(f"http://127.0.0.1:{http}/health") == 503)
        assert status_of(f"http://127.0.0.1:{http}/livez") == 200
        replicas[0] = start(*model, "--name", f"replica-{ports[0]}", "--port", str(ports[0]))
        wait_until(lambda: status_of(f"http://127.0.0.1:{http}/health") == 200, 90)
        assert [str(answer) for answer in client.generate(["DeepSpeed is"] * 4, **OPTIONS)] == [expected] * 4
    for process in (front, replicas[0]):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert processes_of(cache) == {}


def _list() -> str:
    return subprocess.run(
        [sys.executable, "-m", "mii", "list", "--json"], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_names_are_looked_up_again_and_what_they_no_longer_say_stays_until_they_say_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"pods:1": [["10.0.0.1:1"], ["10.0.0.1:1", "10.0.0.2:1"], [], ["10.0.0.3:1"]], "10.0.0.9:2": []}
    taken: list[Sequence[str]] = []

    async def resolve(address: str) -> list[str]:
        if address == "10.0.0.9:2":
            return [address]
        answers = said[address]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def follow() -> None:
        task = asyncio.ensure_future(addresses.follow_addresses(list(said), taken.append))
        while len(taken) < 3:
            await asyncio.sleep(0.01)
        await addresses.end(task)

    monkeypatch.setattr(addresses, "resolve", resolve)
    monkeypatch.setattr(addresses, "_LOOK_SECONDS", 0.01)
    asyncio.run(asyncio.wait_for(follow(), 20))
    assert taken == [
        ["10.0.0.1:1", "10.0.0.9:2"],
        ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.9:2"],
        ["10.0.0.3:1", "10.0.0.9:2"],
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("localhost:50050", ["127.0.0.1:50050"]),  # which has an address of version 6 too, on most machines
        ("10.1.2.3:7", ["10.1.2.3:7"]),
        ("[::1]:7", ["[::1]:7"]),
        ("there-is.no.such.name.invalid:7", []),
    ],
)
def test_what_an_address_stands_for(given: str, expected: list[str]) -> None:
    assert asyncio.run(addresses.resolve(given)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replica_addresses": ["host"]}, "'host' is no address of a replica; give host:port"),
        ({"replica_addresses": ["host:0"]}, "no address of a replica"),
        ({"replica_only": True, "model_config": {"replica_num": 2}}, "replica_only is one replica"),
        ({"replica_only": True, "enable_restful_api": True}, "'mii balance' does"),
        ({"replica_only": True, "replica_addresses": ["a:1"]}, "'mii balance' does"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], words: str) -> None:
    model = {"model_name_or_path": "m", **options.pop("model_config", {})}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=words):
        MIIConfig(model_config=model, **options)
