"""Which processes of a deployment are started when, by what they say and how many cores there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii.launch import start_queue
from mii.launch.child import Child
from mii.launch.folder import DeploymentFolder
from mii.launch.process import Message, Progress, Ready
from mii.launch.start_queue import StartQueue
from mii.launch.state import BALANCER, GATEWAY, Spec, engine_role, front_role

ENGINE, FRONT = engine_role(0), front_role(0)


@pytest.fixture
def children(tmp_path: Path) -> dict[str, Child]:
    """Processes that are not really started; the test says what they say."""
    folder = DeploymentFolder(tmp_path)
    groups = {BALANCER: "", FRONT: "", ENGINE: ENGINE, GATEWAY: ""}
    return {role: Child(Spec(role, [], group=group), folder, 0) for role, group in groups.items()}


def roles(started: list[Child]) -> list[str]:
    return [child.spec.role for child in started]


def say(child: Child, message: Message) -> None:
    child._note(message)


def test_on_two_cores_the_engine_has_one_and_the_others_follow_one_another(children: dict[str, Child]) -> None:
    queue = StartQueue(list(children.values()), cores=2)
    assert roles(queue.take()) == [ENGINE, FRONT]
    assert roles(queue.take()) == [] and queue
    say(children[FRONT], Progress("importing gRPC"))
    say(children[ENGINE], Ready())
    assert roles(queue.take()) == []
    say(children[FRONT], Progress("waiting for the engine", waits=True))
    assert roles(queue.take()) == [GATEWAY]
    say(children[GATEWAY], Ready())
    assert roles(queue.take()) == [BALANCER]
    assert not queue and queue.take() == []


def test_with_cores_for_all_they_start_at_once(children: dict[str, Child]) -> None:
    queue = StartQueue(list(children.values()), cores=4)
    assert sorted(roles(queue.take())) == sorted(children)
    assert not queue


def test_on_a_single_core_they_start_too(children: dict[str, Child]) -> None:
    assert roles(StartQueue(list(children.values()), cores=1).take()) == [ENGINE, FRONT]


def test_one_that_says_nothing_holds_the_others_up_for_a_while_only(
    children: dict[str, Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_queue, "_BUSY_SECONDS", 0.0)
    queue = StartQueue(list(children.values()), cores=2)
    assert roles(queue.take()) == [ENGINE, FRONT]
    assert roles(queue.take()) == [GATEWAY]
