"""Clients that vanish in the middle of their answers leave nothing: no block, thread, descriptor or byte of growth."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving.clusters import Cluster, shared_cluster
from tests.serving.crowd import crowd, http_options
from tests.serving.deployments import wait_until
from tests.serving.standin import Options

VANISHING = 200
ROLES = ("balancer", "gateway", "replica-0-front", "replica-0-engine")
# What an allocator may keep of a round, once it has seen two: far less than a stream that was forgotten would hold.
SPARE_BYTES = VANISHING * 10 * 1024

# Half of the clients use gRPC, half HTTP; they read for ever, and this process is killed.
CLIENTS = """
import asyncio, json, sys
from mii.benchmark.serving.load import Load, pack, run_load
from mii.benchmark.serving.target import TargetSpec, make_target
from mii.benchmark.serving.work import Ask

address, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def main():
    asks = [Ask([10 + number % 200] * 20, 20, 5000) for number in range(count)]
    specs = [TargetSpec("grpc", address), TargetSpec("mii", url)]
    targets = [make_target(spec) for spec in specs]
    runs = [run_load(target, pack(target, asks), Load(clients=count), exact=True) for target in targets]
    await asyncio.gather(*runs)

asyncio.run(main())
"""


@dataclass(frozen=True)
class Usage:
    """What a process holds: threads by their names, descriptors by what they are of, and bytes."""

    threads: Counter[str]
    descriptors: Counter[str]
    resident: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        threads, descriptors = Counter[str](), Counter[str]()
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended just now
                threads[(task / "comm").read_text().strip()] += 1
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed just now
                descriptors[os.readlink(entry).partition(":[")[0]] += 1
        return cls(threads, descriptors, int(fields["VmRSS"].split()[0]) * 1024)

    def beyond(self, other: Usage) -> Counter[str]:
        """The threads and descriptors that it has and the other one has not."""
        return (self.threads - other.threads) + (self.descriptors - other.descriptors)


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=0.05, num_blocks=100_000)
    with shared_cluster(tmp_path_factory, tiny_llama, replicas=1, options=options, **http_options()) as running:
        yield running


def usage(cluster: Cluster) -> dict[str, Usage]:
    return {role: Usage.of(int(cluster.role(role).pid)) for role in ROLES}


def vanish(cluster: Cluster) -> None:
    """Clients come, read some tokens and are gone; returns when the deployment has noticed."""
    url = f"http://127.0.0.1:{cluster.config.restful_api_port}/mii/{cluster.config.deployment_name}"
    command = [sys.executable, "-c", CLIENTS, cluster.address, url, str(VANISHING // 2)]
    replica = lambda: cluster.client.stats()["replicas"][0]  # noqa: E731
    before = replica()["generated_tokens"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    try:
        wait_until(lambda: replica()["engine"]["running"] == VANISHING, seen=replica)
        wait_until(lambda: replica()["generated_tokens"] > before + 3 * VANISHING, seen=replica)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    cluster.wait_idle()


def growth(cluster: Cluster) -> dict[str, int]:
    """Bytes that each process has grown by in two rounds; its threads and descriptors have not become more."""
    before = usage(cluster)
    for _ in range(2):
        vanish(cluster)

    def more() -> dict[str, Counter[str]]:
        beyond = {role: held.beyond(before[role]) for role, held in usage(cluster).items()}
        return {role: kinds for role, kinds in beyond.items() if kinds}

    wait_until(lambda: not more(), seen=more)
    return {role: held.resident - before[role].resident for role, held in usage(cluster).items()}


def test_clients_that_vanish_leave_nothing(cluster: Cluster) -> None:
    for _ in range(2):  # what is made once and kept: pools, code, the allocator's own
        vanish(cluster)
    grown: list[dict[str, int]] = []
    while not grown or max(grown[-1].values()) >= SPARE_BYTES:
        assert len(grown) < 3, grown  # an allocator goes up and down by a megabyte; what is forgotten grows each time
        grown.append(growth(cluster))
    counts = cluster.client.stats()
    assert counts["replicas"][0]["finished"].get("cancelled", 0) >= 4 * VANISHING
    with crowd(cluster.config, 8, 5) as clients:
        wait_until(lambda: len(clients.outcomes) >= 16)
    assert all(outcome.good for outcome in clients.outcomes)
