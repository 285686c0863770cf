"""Replicas that are added to and taken from a deployment that runs, with every process real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mii
from mii.backend import MIIClient, scaling
from mii.backend.plan import make_plan
from mii.backend.ports import is_free
from mii.config import get_mii_config
from mii.config.registry import deployment_folder
from mii.errors import DeploymentError, PlacementError, ServerUnavailableError
from mii.launch.state import Plan, engine_role, read_state
from tests.serving.clusters import NAME, running_cluster
from tests.serving.deployments import processes_of, wait_until
from tests.serving.standin import Options

PROMPTS = ["DeepSpeed is", "Seattle is", "A", "The replica that"]
SLOW = Options(step_seconds=0.05)
_PAUSE_SECONDS = 0.1


def roles_of(folder: Path) -> set[str]:
    """What runs, by its processes' command lines."""
    return {command.split()[-1] for command in processes_of(folder).values() if "mii.launch.supervisor" not in command}


def names_left(replica: int) -> list[str]:
    """Files of a replica."""
    folder = deployment_folder(NAME)
    names = [path.name for path in [*folder.path.rglob("*"), *folder.run.rglob("*")]]
    return [name for name in names if name.startswith((f"replica-{replica}-", f"engine-{replica}."))]


class Load:
    """Streams one after the other in each of some threads, as long as the block runs, with pauses in which what
    starts meanwhile gets on.

    Args:
        expected: the answer to each prompt, all of which must come every time.
    """

    def __init__(self, expected: dict[str, str], **options: Any) -> None:
        self.ended, self.wrong = 0, []
        self._expected, self._options, self._stop = expected, options, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(prompt,)) for prompt in expected]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, prompt: str) -> None:
        with mii.client(NAME) as client:
            while not self._stop.wait(_PAUSE_SECONDS):
                try:
                    pieces = [piece for step in client.stream(prompt, **self._options) for piece in step]
                except Exception as error:  # whatever it is, it must not come
                    self.wrong.append(repr(error))
                    continue
                text = "".join(piece.generated_text for piece in pieces)
                if text != self._expected[prompt]:
                    self.wrong.append(text)
                self.ended += 1


def test_from_one_to_three_and_back_under_streams_no_request_fails_and_nothing_stays(
    tiny_llama: Path, cache: Path
) -> None:
    options = {"max_new_tokens": 40, "do_sample": False, "ignore_eos": True}
    client = mii.serve(str(tiny_llama), deployment_name=NAME, device="cpu", dtype="fp32", progress=False)
    expected = {prompt: str(client.generate(prompt, **options)[0]) for prompt in PROMPTS}
    with Load(expected, **options) as load:
        client.scale(3)
        assert [replica["ready"] for replica in client.health()["replicas"]] == [True] * 3
        ports = [replica.tensor_parallel_ports[0] for replica in get_mii_config(NAME).model_conf.replica_configs]
        served = [sum(replica["finished"].values()) for replica in client.stats()["replicas"]]
        wait_until(lambda: all(now > then for now, then in zip(_finished(client), served, strict=True)))
        listed = json.loads(_mii("list", "--json"))
        assert [entry["replicas"] for entry in listed] == [3]
        _mii("scale", NAME, "1")
        before = load.ended
        assert len(client.health()["replicas"]) == 1
        wait_until(lambda: load.ended > before + 4)
    assert load.wrong == []
    assert get_mii_config(NAME).model_conf.replica_num == 1
    assert roles_of(cache) == {"balancer", "replica-0-front", "replica-0-engine"}
    assert [is_free(port) for port in ports] == [False, True, True]
    assert [names_left(replica) for replica in (1, 2)] == [[], []]
    client.terminate_server()


def _finished(client: MIIClient) -> list[int]:
    return [sum(replica["finished"].values()) for replica in client.stats()["replicas"]]


def _mii(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mii", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_replica_that_goes_has_the_time_to_drain_and_what_it_has_not_begun_goes_elsewhere(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster(monkeypatch, tiny_llama, replicas=2, options=SLOW, drain_seconds=1.5) as cluster:
        client = cluster.client
        streams = [client.stream(prompt, max_new_tokens=200) for prompt in PROMPTS]  # 10 s
        for stream in streams:
            next(stream)
        with ThreadPoolExecutor() as threads:
            whole = [threads.submit(client.generate, prompt, max_new_tokens=60) for prompt in PROMPTS]
            wait_until(lambda: client.stats()["balancer"]["outstanding"] == 8)
            begun = time.monotonic()
            client.scale(1)
            seconds = time.monotonic() - begun
            ends = [_end_of(stream) for stream in streams]
            assert [len(answer.result()) for answer in whole] == [1] * 4
        assert 1.5 <= seconds < 8.0
        assert sorted(ends) == ["ServerUnavailableError"] * 2 + ["length"] * 2
        assert client.stats()["balancer"]["retries"] == 2


def _end_of(stream: Iterator[Any]) -> str:
    try:
        return [str(piece.finish_reason.value) for step in stream for piece in step if piece.finish_reason][-1]
    except ServerUnavailableError as error:
        return type(error).__name__


def test_a_replica_that_was_added_is_started_again_like_the_others(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster(monkeypatch, tiny_llama, replicas=1) as cluster:
        cluster.client.scale(2)
        killed = cluster.kill(engine_role(1))
        cluster.wait_back(engine_role(1), killed)
        killed = cluster.kill("balancer")  # a new one finds all replicas
        cluster.wait_back("balancer", killed)
        wait_until(lambda: [replica["ready"] for replica in cluster.client.health()["replicas"]] == [True] * 2)


def test_what_cannot_be_is_refused_and_changes_nothing(
    tiny_llama: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    with running_cluster(monkeypatch, tiny_llama, replicas=1, hostfile=str(tmp_path / "hosts")) as cluster:
        before = deployment_folder(NAME).config_file.read_bytes()
        for count in (0, -1, True, 1.5):
            with pytest.raises(PlacementError, match=r"a deployment has one at least"):
                cluster.client.scale(count)  # type: ignore[arg-type]
        with pytest.raises(PlacementError, match=r"2 more replicas.*do not fit: 1 run.*Ask for 2 replicas at most"):
            cluster.client.scale(3)
        with pytest.raises(PlacementError, match=r"device 0 is used twice"):
            cluster.client.scale(2, device_map=[[0]])
        with pytest.raises(PlacementError, match=r"device 2 is not there; the host has 2"):
            cluster.client.scale(2, device_map=[[2]])
        assert deployment_folder(NAME).config_file.read_bytes() == before
        cluster.client.scale(2, device_map=[[1]])
        assert len(cluster.client.health()["replicas"]) == 2
        done = subprocess.run(
            [sys.executable, "-m", "mii", "scale", NAME, "3"], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@contextmanager
def broken_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that are added end at once."""

    def plan(*arguments: Any, **options: Any) -> Plan:
        made = make_plan(*arguments, **options)
        broken = [
            msgspec.structs.replace(spec, command=["sh", "-c", "echo it broke; exit 3"])
            if spec.role == engine_role(1)
            else spec
            for spec in made.processes
        ]
        return msgspec.structs.replace(made, processes=broken)

    with monkeypatch.context() as patch:
        patch.setattr(scaling, "make_plan", plan)
        yield


def test_where_a_new_replica_does_not_start_everything_is_as_before(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster(monkeypatch, tiny_llama, replicas=1) as cluster:
        files = (deployment_folder(NAME).config_file, deployment_folder(NAME).plan_file)
        before = [file.read_bytes() for file in files]
        with (
            broken_engines(monkeypatch),
            pytest.raises(DeploymentError, match=r"(?s)replica-1-engine ended with exit code 3; .*it broke"),
        ):
            cluster.client.scale(3)
        assert [file.read_bytes() for file in files] == before
        assert roles_of(cache) == {"balancer", "replica-0-front", "replica-0-engine"}
        assert [names_left(replica) for replica in (1, 2)] == [[], []]
        assert len(cluster.client.health()["replicas"]) == 1
        assert cluster.client.generate("A", max_new_tokens=4, ignore_eos=True)[0].generated_length == 4
        cluster.client.scale(2)


def test_a_deployment_that_starts_or_is_changed_already_says_so_and_one_that_ends_meanwhile_leaves_nothing(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Options(load_seconds=4.0)
    with ThreadPoolExecutor() as threads, pytest.MonkeyPatch.context() as patch:
        starting = threads.submit(_refusals_until_it_runs)
        with running_cluster(patch, tiny_llama, replicas=1, options=slow) as cluster:
            refusals = starting.result()
            assert refusals
            assert all("it is starting; replicas can be added" in refusal for refusal in refusals)
            first = threads.submit(cluster.client.scale, 2)
            wait_until(lambda: len(_processes()) > 3)
            with pytest.raises(DeploymentError, match="are being added or taken away already; wait"):
                mii.client(NAME).scale(3)
        with pytest.raises(DeploymentError, match="the deployment ends"):
            first.result()
    assert processes_of(cache) == {}


def _processes() -> list[str]:
    state = read_state(deployment_folder(NAME).state_file)
    return [process.role for process in state.processes] if state else []


def _refusals_until_it_runs() -> list[str]:
    refusals = []
    while True:
        state = read_state(deployment_folder(NAME).state_file)
        if state is not None and state.stage == "running":
            return refusals
        if state is not None:
            try:
                mii.client(NAME).scale(2)
            except DeploymentError as error:
                refusals.append(str(error))
        time.sleep(0.2)
