"""Requests of many threads, put and awaited one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError

from mii.batching.data_classes import GenerationFinishReason, Response
from mii.errors import GenerationError, PipelineDestroyedError, PromptTooLongError, PromptTypeError, RequestError
from tests.batching.fake_engine import saying

Make = Callable[..., tuple[Any, Any]]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_request_comes_back_with_its_number(make_async: Make) -> None:
    pipe, _ = make_async(answers=saying("one", "second"))
    first, second = pipe.put_request("a", {}), pipe.put_request("bb", {"max_new_tokens": 4})
    got = dict([pipe.get_response(60), pipe.get_response(60)])
    assert got == {
        first: Response("one", 1, 4, GenerationFinishReason.STOP),
        second: Response("seco", 2, 4, GenerationFinishReason.LENGTH),
    }


def test_requests_put_before_the_start_are_answered_after_it(make_async: Make) -> None:
    pipe, _ = make_async(start=False, answers=saying("one"))
    uid = pipe.put_request("a")
    pipe.start()
    pipe.start()
    assert pipe.get_response(60)[0] == uid


def test_calling_it_runs_the_loop(make_async: Make) -> None:
    pipe, _ = make_async(start=False, answers=saying("one"))
    loop = threading.Thread(target=pipe)
    loop.start()
    pipe.put_request("a")
    assert str(pipe.get_response(60)[1]) == "one"
    pipe.shutdown()
    loop.join(60)
    assert not loop.is_alive()


def test_a_streamed_request_comes_in_pieces(make_async: Make) -> None:
    pipe, _ = make_async(answers=saying("abc"))
    uid = pipe.put_request("x", {"stream": True})
    pieces = [pipe.get_response(60) for _ in range(5)]
    assert {piece_uid for piece_uid, _ in pieces} == {uid}
    assert [piece.generated_text for _, piece in pieces] == ["a", "b", "c", "", ""]
    assert [piece.generated_length for _, piece in pieces] == [1, 2, 3, 4, 4]
    assert [piece.finish_reason for _, piece in pieces] == ["none"] * 4 + ["stop"]


def test_stop_strings_and_full_text_work(make_async: Make) -> None:
    pipe, engine = make_async(answers=saying(" is big. Next"))
    pipe.put_request("It", {"stop": [". "], "return_full_text": True})
    response = pipe.get_response(60)[1]
    assert (str(response), response.finish_reason, response.generated_length) == ("It is big", "stop", 9)
    wait_until(lambda: not engine.requests)


def test_each_thread_gets_the_responses_to_its_own_requests(make_async: Make) -> None:
    pipe, engine = make_async(at_once=64, on_step=lambda _: time.sleep(0.001))

    def use(thread: int) -> dict[int, str]:
        prompts = {pipe.put_request(f"{thread} {at}", {"seed": 1, "max_new_tokens": 10 + at}): at for at in range(5)}
        return {prompts[uid]: str(response) for uid, response in (pipe.get_response(60) for _ in prompts)}

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(use, range(12)))
    assert together == [use(thread) for thread in range(12)]
    assert max(engine.batch_sizes) > 5


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, RequestError),
        (["a", "b"], {}, PromptTypeError),
        ("a", {"no_such": 1}, ValidationError),
        ("a" * 3000, {}, PromptTooLongError),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    make_async: Make, prompt: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    pipe, engine = make_async(answers=saying("fine"))
    with pytest.raises(error):
        pipe.put_request(prompt, options)
    assert not engine.seen
    uid = pipe.put_request("a")
    assert pipe.get_response(60)[0] == uid


def test_a_request_that_the_engine_refuses_is_an_error_of_that_request(make_async: Make) -> None:
    pipe, _ = make_async(answers=saying("fine"), capacity=5)
    bad = pipe.put_request("a" * 6)
    with pytest.raises(PromptTooLongError, match=f"request {bad}: 6 tokens"):
        pipe.get_response(60)
    good = pipe.put_request("a")
    assert pipe.get_response(60)[0] == good


def test_a_request_that_fails_alone_leaves_the_others(make_async: Make) -> None:
    pipe, _ = make_async(answers=lambda request: iter([-1] if request.prompt_ids == [98] else list(b"fine")))
    good, bad = pipe.put_request("a"), pipe.put_request("b")
    with pytest.raises(GenerationError, match=f"request {bad}: its numbers are not finite"):
        pipe.get_response(60)
    assert pipe.get_response(60) == (good, Response("fine", 1, 5, GenerationFinishReason.STOP))


def test_a_step_that_fails_tells_every_thread_and_the_next_request_works(make_async: Make) -> None:
    failed: list[int] = []

    def fail_once(step: int) -> None:
        if not failed:
            failed.append(step)
            raise MemoryError("device out of memory")

    pipe, engine = make_async(start=False, answers=saying("fine"), on_step=fail_once)
    ready = threading.Barrier(4)

    def use(_: int) -> str:
        pipe.put_request("a")
        ready.wait(60)
        with pytest.raises(GenerationError) as caught:
            pipe.get_response(60)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        told = [pool.submit(use, at) for at in range(3)]
        ready.wait(60)
        pipe.start()
        assert all("device out of memory" in one.result(60) for one in told)
    assert not engine.requests
    pipe.put_request("a")
    assert str(pipe.get_response(60)[1]) == "fine"
    assert not pipe.is_shutdown()


def test_a_loop_that_breaks_tells_every_waiter_and_refuses_new_requests(
    make_async: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = make_async(start=False, answers=saying("fine"))
    monkeypatch.setattr(pipe._tracker, "update", lambda _: 1 / 0)
    uid = pipe.put_request("a")
    with pytest.raises(ZeroDivisionError):
        pipe()
    with pytest.raises(GenerationError, match=f"request {uid}: the generation loop failed: ZeroDivisionError"):
        pipe.get_response(60)
    assert pipe.is_shutdown()
    with pytest.raises(PipelineDestroyedError):
        pipe.put_request("a")


def test_flush_frees_a_running_request_and_no_response_of_it_comes(make_async: Make) -> None:
    pipe, engine = make_async(on_step=lambda _: time.sleep(0.001))
    uid = pipe.put_request("a", {"max_new_tokens": 1900})
    wait_until(lambda: engine.requests)
    pipe.flush_uid(uid)
    wait_until(lambda: engine.aborted == [uid])
    pipe.flush_uid(uid)
    pipe.flush_uid(12345)
    with pytest.raises(RuntimeError, match="owes a response"):
        pipe.get_response(60)
    other = pipe.put_request("b", {"max_new_tokens": 3})
    assert pipe.get_response(60)[0] == other


def test_flush_by_another_thread_frees_a_thread_that_waits(make_async: Make) -> None:
    pipe, engine = make_async(on_step=lambda _: time.sleep(0.001))
    uids: list[int] = []

    def wait() -> None:
        uids.append(pipe.put_request("a", {"max_new_tokens": 1900}))
        pipe.get_response(60)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        wait_until(lambda: uids and engine.requests)
        pipe.flush_uid(uids[0])
        with pytest.raises(RuntimeError, match="owes a response"):
            waiting.result(60)


def test_waiting_for_nothing_is_an_error_and_waiting_too_long_a_timeout(make_async: Make) -> None:
    pipe, _ = make_async(start=False)
    with pytest.raises(RuntimeError, match="owes a response"):
        pipe.get_response()
    pipe.put_request("a")
    with pytest.raises(TimeoutError):
        pipe.get_response(timeout=0.01)


def test_shutdown_tells_those_who_wait_and_frees_the_engine(make_async: Make) -> None:
    pipe, engine = make_async(on_step=lambda _: time.sleep(0.001))

    def wait() -> None:
        pipe.put_request("a", {"max_new_tokens": 1900})
        pipe.get_response(60)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(wait) for _ in range(2)]
        wait_until(lambda: len(engine.requests) == 2)
        assert not pipe.is_shutdown()
        pipe.shutdown()
        pipe.shutdown()
        for one in waiting:
            with pytest.raises(PipelineDestroyedError, match="shut down"):
                one.result(60)
    assert (pipe.is_shutdown(), engine.destroyed) == (True, 1)
    for use in (lambda: pipe.put_request("a"), pipe.start):
        with pytest.raises(PipelineDestroyedError):
            use()


def test_the_loop_sleeps_while_there_is_nothing_to_do(make_async: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = make_async(start=False, answers=saying("fine"))
    turns: list[int] = []
    take = pipe._driver.take
    monkeypatch.setattr(pipe._driver, "take", lambda inbox: (turns.append(1), take(inbox))[1])
    pipe.start()
    pipe.put_request("a")
    pipe.get_response(60)

    def rests() -> bool:
        before = len(turns)
        time.sleep(0.2)
        return len(turns) == before

    wait_until(rests)
    pipe.put_request("a")
    assert str(pipe.get_response(60)[1]) == "fine"
