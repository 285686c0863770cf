"""`kill -9` of each process of a deployment under load: nobody waits for long, who survives answers, it comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.clusters import Cluster, shared_cluster
from tests.serving.crowd import WAYS, Outcome, crowd, http_options
from tests.serving.deployments import wait_until
from tests.serving.standin import Options

CLIENTS, TOKENS, STEP_SECONDS = 24, 30, 0.01
LONGEST_WAIT = 10.0


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=STEP_SECONDS)
    with shared_cluster(tmp_path_factory, tiny_llama, replicas=2, options=options, **http_options()) as running:
        yield running


def waits(outcomes: list[Outcome], moment: float) -> list[float]:
    """For each call that ran at `moment` or later how long it took from then on."""
    return [outcome.ended - max(outcome.began, moment) for outcome in outcomes if outcome.ended >= moment]


def all_ways_answer(outcomes: list[Outcome]) -> bool:
    good = [outcome.way for outcome in outcomes if outcome.good]
    return len(good) > 2 * CLIENTS and {*good} == {*WAYS}


@pytest.mark.parametrize("role", ["replica-0-engine", "replica-1-front", "balancer", "gateway"])
def test_a_process_is_killed_under_load(cluster: Cluster, role: str) -> None:
    with crowd(cluster.config, CLIENTS, TOKENS) as clients:
        wait_until(lambda: len(clients.outcomes) > 2 * CLIENTS)
        moment = time.monotonic()
        killed = cluster.kill(role)
        cluster.wait_back(role, killed)
        back = time.monotonic()
        # In the end, every way of asking works again, some of them only when a call has waited for its next try.
        wait_until(lambda: all_ways_answer(clients.since(back)))
    outcomes = clients.outcomes
    # Whatever was said is right, and everything that went wrong did so because of the kill.
    assert [outcome for outcome in outcomes if not outcome.right] == []
    failed = [outcome for outcome in outcomes if outcome.error]
    assert all(outcome.ended >= moment for outcome in failed), failed
    assert max(waits(outcomes, moment)) < LONGEST_WAIT
    # What does not need the killed process did not notice.
    spared = {"gateway": ("grpc stream", "grpc")}.get(role, ())
    assert [outcome for outcome in failed if outcome.way in spared] == []
    if role.startswith("replica"):
        # Only what was under way there is lost, each call once, and of it only streams that had begun.
        assert len(failed) <= CLIENTS and all("stream" in outcome.way for outcome in failed), failed
        assert any(outcome.good and moment < outcome.began < back for outcome in outcomes)
    cluster.wait_idle()
