"""When requests are sent, and what is sent, with a target in this process."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time

import pytest

from mii.benchmark.serving.load import Load, Packed, run_load
from mii.benchmark.serving.trace import Failed, Trace
from mii.benchmark.serving.work import Ask, RandomIds, TextWindows, Work, mix_lengths, normal_lengths


class Server:
    """Answers after a while, and counts who waits."""

    def __init__(self, seconds: float = 0.005, tokens: int = 3) -> None:
        self.seconds, self.tokens = seconds, tokens
        self.inside = self.most = 0
        self.seen: list[bytes] = []

    def pack(self, ask: Ask) -> bytes:
        return b""

    async def send(self, payload: bytes, trace: Trace) -> None:
        self.seen.append(payload)
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(self.seconds)
        self.inside -= 1
        if payload == b"bad":
            raise Failed("HTTP 400", "no")
        trace.add(time.monotonic(), self.tokens)

    async def close(self) -> None:
        """There is nothing to close."""


def requests(count: int, payload: bytes = b"good") -> list[Packed]:
    return [Packed(payload, 10, 3) for _ in range(count)]


def test_a_closed_loop_keeps_as_many_requests_under_way_as_it_has_clients() -> None:
    server = Server()
    ran = asyncio.run(run_load(server, requests(50), Load(clients=7), exact=True))
    assert len(ran.traces) == 50 and server.most == 7
    assert not any(trace.kind for trace in ran.traces)
    assert all(trace.due <= trace.sent <= trace.times[0] <= trace.ended for trace in ran.traces)


def test_poisson_arrivals_do_not_wait_for_answers_and_come_at_the_rate() -> None:
    server = Server(seconds=0.3)
    ran = asyncio.run(run_load(server, requests(150), Load(rate=500), exact=True, seed=3))
    due = sorted(trace.due for trace in ran.traces)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert server.most > 100
    assert statistics.mean(gaps) == pytest.approx(1 / 500, rel=0.25)
    assert statistics.stdev(gaps) == pytest.approx(1 / 500, rel=0.35)  # of an exponential distribution: the mean


def test_a_late_start_counts_as_waiting() -> None:
    async def main() -> list[Trace]:
        server = Server(seconds=0.0)
        running = asyncio.ensure_future(run_load(server, requests(20), Load(rate=200), exact=True))
        await asyncio.sleep(0.01)
        time.sleep(0.15)  # this process does nothing else meanwhile
        return (await running).traces

    traces = asyncio.run(main())
    assert max(trace.sent - trace.due for trace in traces) > 0.05
    assert max(trace.seconds for trace in traces) > 0.05


def test_errors_and_short_answers_have_a_kind_and_cost_nobody_else_anything() -> None:
    mixed = [*requests(5), *requests(2, b"bad")]
    ran = asyncio.run(run_load(Server(), mixed, Load(clients=2), exact=True))
    assert sorted(trace.kind for trace in ran.traces) == [""] * 5 + ["HTTP 400"] * 2
    short = asyncio.run(run_load(Server(tokens=2), requests(1), Load(clients=1), exact=True)).traces[0]
    assert (short.kind, short.message) == ("short answer", "2 tokens came of 3")
    assert not asyncio.run(run_load(Server(tokens=2), requests(1), Load(clients=1), exact=False)).traces[0].kind


def test_the_load_generator_says_what_it_used() -> None:
    ran = asyncio.run(run_load(Server(seconds=0.05), requests(4), Load(clients=1), exact=True))
    assert ran.processor_seconds > 0 and len(ran.lateness) >= 4 and min(ran.lateness) >= 0


def test_lengths_are_distributed_as_asked() -> None:
    rng = random.Random(0)
    drawn = [normal_lengths(1000, 0.3, 1500, 60, 0.0)(rng) for _ in range(2000)]
    prompts = [prompt for prompt, _ in drawn]
    assert max(prompts) == 1500 and min(prompts) >= 1
    assert statistics.mean(prompts) == pytest.approx(1000, rel=0.03)
    assert {answer for _, answer in drawn} == {60}
    assert mix_lengths("decode-128-512")(rng) == (128, 512)


def test_no_two_prompts_are_alike_and_a_seed_brings_them_again() -> None:
    def take() -> list[Ask]:
        return Work(normal_lengths(50, 0.3, 4000, 5, 0.3), RandomIds(1000, 7), 7).take(20)

    asks = take()
    assert asks == take()
    assert len({tuple(ask.prompt[:4]) for ask in asks}) == 20
    assert all(len(ask.prompt) == ask.prompt_tokens and set(ask.prompt) <= set(range(10, 990)) for ask in asks)


def test_windows_move_on_by_a_token_and_go_round() -> None:
    windows = TextWindows(list(range(5)), lambda ids: " ".join(map(str, ids)))
    assert windows(0, 3) == "0 1 2" and windows(1, 3) == "1 2 3" and windows(9, 7) == "4 0 1 2 3 4 0"
    with pytest.raises(ValueError, match="is empty"):
        TextWindows([], str)


def test_a_request_that_the_server_cannot_take_is_found_out_before_it_is_sent() -> None:
    work = Work(normal_lengths(100, 0.0, 4000, 30, 0.0), RandomIds(100, 0), 0, limit=128)
    with pytest.raises(ValueError, match=r"100 tokens of prompt and 30 of answer.*takes 128"):
        work.take(1)
