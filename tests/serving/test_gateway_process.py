"""The gateway's own process, and its copies, in deployments of stand-in engines."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mii.config import MIIConfig
from mii.config.registry import deployment_folder
from mii.errors import DeploymentNotFoundError
from mii.launch.folder import DeploymentFolder
from mii.launch.gateway import process_count, settings_of
from tests.serving.clusters import NAME, Cluster, shared_cluster
from tests.serving.crowd import http_options, stand_in_text
from tests.serving.deployments import wait_until
from tests.serving.standin import Options

GATEWAY = "gateway"


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = {"options": Options(step_seconds=0.002), "replicas": 1, "restful_processes": 2, **http_options()}
    options["drain_seconds"] = 120  # nothing may take so long but a wait for what is not there
    with shared_cluster(tmp_path_factory, tiny_llama, **options) as running:
        yield running


def url(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{cluster.config.restful_api_port}"


def ask(cluster: Cluster, prompt: str, **options: Any) -> httpx.Response:
    body = {"prompts": prompt, "max_new_tokens": 5, **options}
    return httpx.post(f"{url(cluster)}/mii/{NAME}", json=body, timeout=60)


def copies(pid: int) -> list[int]:
    """The children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def config(**options: Any) -> MIIConfig:
    return MIIConfig(deployment_name="d", model_config={"model_name_or_path": "m"}, **options)


@pytest.mark.parametrize(
    ("given", "cores", "processes"),
    [(None, 2, 1), (None, 16, 1), (None, 64, 4), (None, 384, 8), (1, 384, 1), (32, 2, 2), (32, 384, 32)],
)
def test_there_are_as_many_processes_as_asked_for_or_as_fit_the_cores(
    given: int | None, cores: int, processes: int
) -> None:
    options = {} if given is None else {"restful_processes": given}
    assert process_count(config(**options), cores) == processes


def test_it_asks_the_load_balancer_on_this_machine_and_knows_the_model_by_both_names(tmp_path: Path) -> None:
    folder = DeploymentFolder(tmp_path)
    settings = settings_of(config(port_number=50123, host="0.0.0.0"), folder)
    assert (settings.balancer, settings.deployment, settings.names) == ("127.0.0.1:50123", "d", ("m", "d"))
    assert settings.socket == folder.calls_socket
    assert settings_of(config(port_number=50123, host="::"), folder).balancer == "[::1]:50123"


def test_copies_answer_together_and_count_together(cluster: Cluster) -> None:
    first = cluster.role(GATEWAY).pid
    assert len(copies(first)) == min(2, len(os.sched_getaffinity(0))) - 1
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: ask(cluster, f"p{number}").json()[0], range(40)))
    assert [answer["generated_text"] for answer in answers] == [stand_in_text(f"p{number}", 5) for number in range(40)]
    for _ in range(4):  # whichever answers
        page = httpx.get(f"{url(cluster)}/metrics").text
        counted = re.search(r'mii_http_requests_total\{route="/mii",status="200"\} (\d+)', page)
        assert counted is not None and int(counted[1]) == 40
        assert 'mii_http_requests_running{route="/mii"} 0.0' in page


def test_a_gateway_that_is_killed_comes_back_with_its_copies(cluster: Cluster) -> None:
    killed = cluster.kill(GATEWAY)
    cluster.wait_back(GATEWAY, killed)
    assert ask(cluster, "again").json()[0]["generated_text"] == stand_in_text("again", 5)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there are no copies on one core")
def test_a_copy_that_is_killed_brings_all_of_them_back(cluster: Cluster) -> None:
    first = cluster.role(GATEWAY).pid
    os.kill(copies(first)[0], signal.SIGKILL)
    cluster.wait_back(GATEWAY, first)
    assert ask(cluster, "once-more").json()[0]["generated_text"] == stand_in_text("once-more", 5)
    assert "one of the gateway's processes has ended" in cluster.log(GATEWAY)


def test_streams_may_end_when_it_is_told_to_stop(cluster: Cluster) -> None:
    first = cluster.role(GATEWAY).pid
    body = {"prompts": "drain", "max_new_tokens": 500, "stream": True}
    with httpx.stream("POST", f"{url(cluster)}/mii/{NAME}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(first, signal.SIGTERM)
        text = "".join(re.findall(r'"generated_text":"([a-z]*)"', "".join(lines)))
    assert stand_in_text("drain", 500).endswith(text) and len(text) > 400
    began = time.monotonic()
    cluster.wait_back(GATEWAY, first)
    assert time.monotonic() - began < cluster.config.drain_seconds, "it waited for nothing"


def test_the_token_ends_it_all(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    gone = pytest.raises(DeploymentNotFoundError)  # what the fixture then finds
    with gone, shared_cluster(tmp_path_factory, tiny_llama, replicas=1, **http_options()) as running:
        folder = deployment_folder(NAME)
        headers = {"Authorization": f"Bearer {folder.read_token()}"}
        assert httpx.post(f"{url(running)}/terminate", headers=headers).status_code == 200
        wait_until(lambda: not folder.path.exists())
