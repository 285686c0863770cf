"""A deployment on two hosts, namespaces of this machine's network, with DeepSpeed's launcher and gRPC between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mii
from mii.config.registry import deployment_folder
from mii.launch.state import ProcessState, read_state
from tests.parallel.test_sharded_models import NINE_HEADS
from tests.serving.deployments import processes_of, wait_until
from tests.serving.hosts import NOWHERE, THERE, Hosts, two_hosts

NAME = "wide"
PROMPTS = ["DeepSpeed is", "Seattle is", "A", "The", "hosts that", "x y z"]
ASK = f"""
import json, mii
client = mii.client({NAME!r})
answers = [str(answer) for answer in client.generate({PROMPTS!r}, max_new_tokens=8, do_sample=False)]
served = [[replica["address"], sum(replica["finished"].values())] for replica in client.stats()["replicas"]]
print(json.dumps([answers, served]))
"""

ASK_ALWAYS = f"""
import mii
client = mii.client({NAME!r})
while True:
    client.generate({PROMPTS!r}, max_new_tokens=8, do_sample=False)
    print("answered", flush=True)
"""


@pytest.fixture(scope="module")
def nine_heads(make_checkpoint: Callable[..., Path]) -> Path:
    """Made before a test's temporary files are looked at: what writes it leaves some."""
    return make_checkpoint(**NINE_HEADS)


@pytest.fixture
def hosts(cache: Path, tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as made:
        yield made
        wait_until(lambda: not processes_of(cache))
        assert made.running == [[], []]


def serve(hosts: Hosts, folder: Path, model: Path, *words: str, slots: str) -> subprocess.CompletedProcess[str]:
    """Starts a deployment from the first host."""
    (folder / "hosts").write_text(slots)
    options = ["--name", NAME, "--hostfile", str(folder / "hosts"), "--device", "cpu", "--dtype", "fp32"]
    return hosts.run("-m", "mii", "serve", str(model), "--detach", *options, *words)


def test_replicas_on_two_hosts_answer_through_one_load_balancer_and_more_come_and_go(
    hosts: Hosts, tmp_path: Path, tiny_llama: Path, cache: Path
) -> None:
    slots = f"localhost slots=1\n{THERE} slots=2\n"
    done = serve(hosts, tmp_path, tiny_llama, "--replicas", "2", slots=slots)
    assert done.returncode == 0, done.stderr
    assert "replica-1-engine: weights" in done.stderr  # what is said over there is seen here
    answers, served = json.loads(hosts.run("-c", ASK).stdout)
    with mii.pipeline(str(tiny_llama), device="cpu", dtype="fp32", progress=False) as pipe:
        assert answers == [str(answer) for answer in pipe(PROMPTS, max_new_tokens=8, do_sample=False)]
    assert [address.partition(":")[0] for address, _ in served] == ["127.0.0.1", THERE]
    assert all(count > 0 for _, count in served)
    assert hosts.run("-m", "mii", "scale", NAME, "3").returncode == 0
    assert len(json.loads(hosts.run("-c", ASK).stdout)[1]) == 3
    before = len(hosts.running[1])
    assert hosts.run("-m", "mii", "scale", NAME, "2").returncode == 0
    wait_until(lambda: len(hosts.running[1]) < before)
    assert json.loads(hosts.run("-c", ASK).stdout)[0] == answers
    assert hosts.run("-m", "mii", "stop", NAME).returncode == 0


def test_a_replica_of_two_ranks_on_the_other_host_answers_as_one_process_and_comes_back(
    hosts: Hosts, tmp_path: Path, nine_heads: Path, cache: Path
) -> None:
    done = serve(hosts, tmp_path, nine_heads, "--tensor-parallel", "2", slots=f"{THERE} slots=2\n")
    assert done.returncode == 0, done.stderr
    answers, served = json.loads(hosts.run("-c", ASK).stdout)
    with mii.pipeline(str(nine_heads), device="cpu", dtype="fp32", progress=False) as pipe:
        assert answers == [str(answer) for answer in pipe(PROMPTS, max_new_tokens=8, do_sample=False)]
    assert [address.partition(":")[0] for address, _ in served] == [THERE]
    ranks = [pid for pid, command in processes_of(cache).items() if command.endswith("replica-0-engine-1.py ")]
    os.kill(max(ranks), signal.SIGKILL)
    wait_until(lambda: restarts_of("replica-0-engine-1") == 1 and restarts_of("replica-0-engine") == 1, seen=processes)
    wait_until(lambda: {process.stage for process in processes()} == {"ready"}, 90, seen=processes)
    assert json.loads(hosts.run("-c", ASK).stdout)[0] == answers
    assert hosts.run("-m", "mii", "stop", NAME).returncode == 0


@pytest.mark.parametrize("first", ["localhost", THERE])
def test_a_replica_divided_over_both_hosts_answers_as_one_process_and_survives_the_death_of_a_rank_there(
    first: str, hosts: Hosts, tmp_path: Path, nine_heads: Path, cache: Path
) -> None:
    other = THERE if first == "localhost" else "localhost"
    slots = f"{first} slots=1\n{other} slots=1\n"
    done = serve(hosts, tmp_path, nine_heads, "--tensor-parallel", "2", slots=slots)
    assert done.returncode == 0, done.stderr
    answers, served = json.loads(hosts.run("-c", ASK).stdout)
    with mii.pipeline(str(nine_heads), device="cpu", dtype="fp32", progress=False) as pipe:
        assert answers == [str(answer) for answer in pipe(PROMPTS, max_new_tokens=8, do_sample=False)]
    assert [address.partition(":")[0] for address, _ in served] == ["127.0.0.1" if first == "localhost" else THERE]
    roles = ("replica-0-engine", "replica-0-engine-1")
    there = roles[first == "localhost"]
    ranks = [pid for pid, command in processes_of(cache).items() if command.endswith(f"{there}.py ")]
    assert set(ranks) & set(hosts.running[1])
    os.kill(max(ranks), signal.SIGKILL)
    wait_until(lambda: all(restarts_of(role) == 1 for role in roles), 10, seen=processes)
    wait_until(lambda: {process.stage for process in processes()} == {"ready"}, 120, seen=processes)
    assert json.loads(hosts.run("-c", ASK).stdout)[0] == answers
    assert hosts.run("-m", "mii", "stop", NAME).returncode == 0


def test_a_replica_whose_hosts_lose_each_other_ends_within_ten_seconds_and_comes_back_with_them(
    hosts: Hosts, tmp_path: Path, nine_heads: Path, cache: Path
) -> None:
    slots = f"localhost slots=1\n{THERE} slots=1\n"
    done = serve(hosts, tmp_path, nine_heads, "--tensor-parallel", "2", slots=slots)
    assert done.returncode == 0, done.stderr
    answers = json.loads(hosts.run("-c", ASK).stdout)[0]
    asking = hosts.start("-c", ASK_ALWAYS)
    assert asking.stdout is not None and asking.stdout.readline()
    hosts.cable("down")
    wait_until(lambda: restarts_of("replica-0-engine") == 1, 10, seen=processes)
    hosts.cable("up")
    asking.kill()
    asking.communicate()
    wait_until(lambda: {process.stage for process in processes()} == {"ready"}, 120, seen=processes)
    assert json.loads(hosts.run("-c", ASK).stdout)[0] == answers
    assert hosts.run("-m", "mii", "stop", NAME).returncode == 0


def processes() -> list[ProcessState]:
    state = read_state(deployment_folder(NAME).state_file)
    return state.processes if state else []


def restarts_of(role: str) -> int:
    return next(process.restarts for process in processes() if process.role == role)


def test_what_keeps_a_host_from_serving_is_said_in_one_sentence(
    hosts: Hosts, tmp_path: Path, tiny_llama: Path, cache: Path
) -> None:
    def refused(*words: str, host: str = THERE) -> str:
        done = serve(hosts, tmp_path, tiny_llama, "--no-progress", *words, slots=f"{host} slots=1\n")
        assert done.returncode == 1
        return done.stderr.splitlines()[0]

    assert f"host '{NOWHERE}' cannot be reached with ssh: " in refused(host=NOWHERE)
    divided = ("--tensor-parallel", "2")
    assert f"host '{NOWHERE}' cannot be reached with ssh: " in refused(*divided, host=f"localhost slots=1\n{NOWHERE}")
    listener = hosts.start("-c", LISTEN, "50051", there=True)
    assert listener.stdout is not None and listener.stdout.readline()
    assert f"port 50051 is taken on host '{THERE}'; choose another port_number" in refused("--port", "50050")
    listener.kill()
    listener.communicate()
    hosts.refuse()
    assert f"host '{THERE}' cannot be reached with ssh: ssh: connect to host {THERE} port 22: " in refused()


LISTEN = """
import socket, sys, time
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("listening", flush=True)
time.sleep(600)
"""
