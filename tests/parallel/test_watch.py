"""Ranks that die or stand still are found out by the others, whatever these wait for: real processes, real sockets.

Turns and heartbeats are half as long here as they are; times are given as multiples of theirs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mii.errors import GenerationError
from mii.parallel import watch as module
from mii.parallel.watch import FirstWatch, OtherWatch
from tests.serving.deployments import wait_until

TIMES = ("_TURN_MS", "_HEARTBEAT_MS", "_HEARTBEAT_TIMEOUT_MS")
SHORTER = 2
SHORTEN = f"""
import sys, time
from mii.parallel import watch as module
for name in {TIMES}:
    setattr(module, name, getattr(module, name) // {SHORTER})
"""
# A rank that is within a step for as long as it lives.
OTHER = """
from mii.parallel.watch import OtherWatch
watch = OtherWatch(int(sys.argv[1]), 3, sys.argv[2])
print("there", flush=True)
with watch.step():
    time.sleep(600)
"""
FIRST = """
from mii.parallel.watch import FirstWatch
watch = FirstWatch(2, sys.argv[1])
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TIMES:
        monkeypatch.setattr(module, name, getattr(module, name) // SHORTER)


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SHORTEN + code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stdout.readline() == "there\n"
            yield running
        finally:
            running.kill()


class Ended:
    """What ends the process of a rank in these tests notes the reason, and when."""

    def __init__(self) -> None:
        self.event, self.reason, self.at = threading.Event(), "", 0.0

    def __call__(self, reason: str) -> None:
        self.reason, self.at = reason, time.monotonic()
        self.event.set()


@pytest.mark.parametrize(("number", "most"), [(signal.SIGKILL, 7.0), (signal.SIGSTOP, 10.0)])
def test_rank_0_within_a_step_ends_when_another_one_dies_or_stands_still(
    number: signal.Signals, most: float, tmp_path: Path
) -> None:
    ended = Ended()
    first = FirstWatch(3, f"ipc://{tmp_path}/watch", ended)
    with process(OTHER, "1", first.address), process(OTHER, "2", first.address) as second:
        with first.step():
            wait_until(lambda: set(first._unreached.values()) == {0})
            begin = time.monotonic()
            os.kill(second.pid, number)
            assert ended.event.wait(30)
        assert ended.reason == "rank 2 of 3 is gone or stands still"
        assert ended.at - begin < most / SHORTER + 2
        with pytest.raises(GenerationError, match="rank 2 of 3 is gone or stands still"), first.step():
            pass
    first.close()


def test_a_step_that_ends_leaves_the_process_alone_and_no_further_one_begins(tmp_path: Path) -> None:
    ended = Ended()
    first = FirstWatch(2, f"ipc://{tmp_path}/watch", ended)
    with process(OTHER, "1", first.address) as other:
        wait_until(lambda: first._unreached[1] == 0)
        with first.step():
            other.kill()
        wait_until(lambda: bool(first._lost), seconds=20)
        with pytest.raises(GenerationError, match="rank 1 of 2 is gone"), first.step():
            pass
        assert not ended.event.wait(6 / SHORTER)
    first.close()


def test_another_rank_within_a_step_ends_its_process_when_rank_0_stands_still(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/watch"
    with process(FIRST, address) as first, process(OTHER, "1", address) as other:
        time.sleep(2)
        assert other.poll() is None
        begin = time.monotonic()
        os.kill(first.pid, signal.SIGSTOP)
        assert other.wait(30) == 1
        assert time.monotonic() - begin < 10 / SHORTER + 2
        assert other.stderr is not None and "rank 0 of 3 is gone or stands still" in other.stderr.read()


def test_a_farewell_ends_the_watch(tmp_path: Path) -> None:
    ended = Ended()
    first = FirstWatch(2, f"ipc://{tmp_path}/watch", ended)
    other = OtherWatch(1, 2, first.address, ended)
    wait_until(lambda: first._unreached[1] == 0)
    first.close()
    with other.step():
        other._thread.join(5)
        assert not other._thread.is_alive()
    with other.step():
        pass
    other.close()
    assert not ended.reason


def test_who_stood_still_for_a_moment_is_not_lost(tmp_path: Path) -> None:
    ended = Ended()
    first = FirstWatch(2, f"ipc://{tmp_path}/watch", ended)
    with process(OTHER, "1", first.address) as other, first.step():
        wait_until(lambda: first._unreached[1] == 0)
        os.kill(other.pid, signal.SIGSTOP)
        time.sleep(2.5 / SHORTER)
        os.kill(other.pid, signal.SIGCONT)
        assert not ended.event.wait(12 / SHORTER) and other.poll() is None
    first.close()
