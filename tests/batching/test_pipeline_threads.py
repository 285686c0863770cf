"""One pipeline in several threads, and Ctrl-C in any of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mii.errors import PipelineDestroyedError, PromptTooLongError

Make = Callable[..., tuple[Any, Any]]


def test_threads_share_batches_and_each_gets_its_own_answers(make_pipeline: Make) -> None:
    """As many calls at once as threads; every answer is what the same call gives alone."""
    pipe, engine = make_pipeline(at_once=64, on_step=lambda _: time.sleep(0.002))
    calls = [([f"p{call} {at}" for at in range(3)], {"max_new_tokens": 25, "seed": call}) for call in range(12)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda call: pipe(call[0], **call[1]), calls))
    shared = max(engine.batch_sizes)
    assert results == [pipe(prompts, **options) for prompts, options in calls]
    assert shared > 3
    assert not engine.requests


def test_a_call_that_fails_leaves_other_threads_alone(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(capacity=50, on_step=lambda _: time.sleep(0.001))

    def call(number: int) -> str:
        if number % 3 == 0:
            with pytest.raises(PromptTooLongError):
                pipe("x" * 60)
            return "refused"
        if number % 3 == 1:
            with pytest.raises(ZeroDivisionError):
                pipe("y", streaming_fn=lambda _: 1 / 0, max_new_tokens=50)
            return "failed"
        return str(pipe("z", max_new_tokens=30, seed=number)[0])

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(call, range(30)))
    assert results == [call(number) for number in range(30)]


def test_destroy_tells_a_call_of_another_thread(make_pipeline: Make) -> None:
    started = threading.Event()

    def step(_: int) -> None:
        started.set()
        time.sleep(0.002)

    pipe, engine = make_pipeline(on_step=step)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(pipe, "a", max_new_tokens=1500)
        assert started.wait(60)
        pipe.destroy()
        with pytest.raises(PipelineDestroyedError):
            call.result(timeout=60)
    assert engine.destroyed == 1


@pytest.mark.parametrize("where", ["in a step", "between steps", "in a callback"])
def test_ctrl_c_ends_the_call_at_once_and_the_pipeline_stays_usable(make_pipeline: Make, where: str) -> None:
    finished: list[int] = []

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    def step(number: int) -> None:
        if where == "in a step" and number == 3:
            interrupt()
        finished.append(number)

    def call() -> None:
        if where == "between steps":
            for _ in pipe.stream(["a", "b"]):
                interrupt()
        on_piece = (lambda _: interrupt()) if where == "in a callback" else None
        pipe(["a", "b"], streaming_fn=on_piece, max_new_tokens=1000)

    pipe, engine = make_pipeline(on_step=step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert not engine.requests
    assert signal.getsignal(signal.SIGINT) is before
    if where == "in a step":
        assert finished[-1] == 3, "the step was cut in half, or more steps were run"
    assert len(pipe("a", max_new_tokens=2)) == 1


def test_a_second_ctrl_c_breaks_into_a_step_that_hangs(make_pipeline: Make) -> None:
    def hang_once(_: int) -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second Ctrl-C was held back too")

    steps: list[int] = []

    pipe, engine = make_pipeline(on_step=hang_once)
    with pytest.raises(KeyboardInterrupt):
        pipe("a", max_new_tokens=1000)
    assert not engine.requests
    assert len(pipe("a", max_new_tokens=2)) == 1


def test_ctrl_c_in_one_thread_leaves_the_answers_of_others_whole(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(on_step=lambda _: time.sleep(0.001))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(pipe, "z", max_new_tokens=100, seed=4)
        timer = threading.Timer(0.03, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pipe("a", max_new_tokens=1900)
        answer = other.result(timeout=60)
    assert answer == pipe("z", max_new_tokens=100, seed=4)
    assert not engine.requests
