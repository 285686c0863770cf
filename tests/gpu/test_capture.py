"""Graphs captured at the start: all of them, in little time, with the same answers, and with their memory set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mii.engine.graphs import all_buckets
from tests.gpu.test_engine import LENGTHS, card_engine
from tests.oracle import generate, random_prompts


def test_answers_are_those_of_launched_steps(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = card_engine(tiny_llama, "fp32", max_tokens=256, max_sequences=64)
    assert engine.runner is not None
    assert engine.runner.graphs is not None
    planned = all_buckets(64, engine.runner.most_captured)
    assert len(engine.runner.graphs) == len(planned)
    prompts = random_prompts(engine.vocab_size, [*LENGTHS, 150])
    answers = generate(engine, prompts, 24)
    assert len(engine.runner.graphs) == len(planned)  # no step was in need of another one
    engine.destroy()
    monkeypatch.setattr("mii.engine.loading.CAPTURE_SECONDS", -1.0)  # none: steps are launched first
    later = card_engine(tiny_llama, "fp32", max_tokens=256, max_sequences=64)
    assert generate(later, prompts, 24) == answers
    later.destroy()


def test_a_token_that_may_not_come_yet_is_held_back_in_the_first_step(tiny_llama: Path) -> None:
    """The graphs were captured before any request asked for it."""
    from mii.batching.data_classes import EngineRequest

    engine = card_engine(tiny_llama, "fp32")
    prompt = random_prompts(engine.vocab_size, [9])[0]
    ends = engine.stop_ids
    request = EngineRequest(uid=0, prompt_ids=prompt, max_new_tokens=20, min_new_tokens=20, stop_ids=ends)
    engine.add_request(request)
    answer: list[int] = []
    while engine.has_work:
        for output in engine.step():
            answer += output.token_ids
    assert len(answer) == 20
    assert not set(answer[:-1]) & set(ends)
    engine.destroy()


def test_what_graphs_take_is_no_more_than_was_set_aside(tiny_llama: Path) -> None:
    """The least of a few tries: the card's free memory is looked at, which other processes change meanwhile."""
    for _ in range(3):
        beyond = _taken_beyond_what_was_set_aside(tiny_llama)
        if beyond <= 64 << 20:
            return
    pytest.fail(f"the graphs took {beyond} bytes more than was set aside")


def _taken_beyond_what_was_set_aside(folder: Path) -> int:
    from mii.engine.capture import capture_steps, graph_memory
    from mii.engine.devices import free_memory

    engine = card_engine(folder, "bf16", max_tokens=512, max_sequences=64)
    runner = engine.runner
    assert runner is not None
    reserved = graph_memory(runner, lambda: free_memory(runner.device))
    runner.make_cache(64)
    torch.cuda.synchronize()
    before = free_memory(runner.device)
    captured = capture_steps(runner, 60)
    assert captured.graphs == captured.planned
    taken = before - free_memory(runner.device)
    engine.destroy()
    return taken - reserved


def test_the_ledger_accounts_for_all_memory(tiny_llama: Path) -> None:
    from mii.benchmark.memory import memory_ledger, reset_peak

    engine = card_engine(tiny_llama, "bf16", max_tokens=128, max_sequences=16)
    assert engine.runner is not None
    reset_peak(engine.runner.device)
    generate(engine, [[5, 6, 7]], 8)
    ledger = memory_ledger(engine)
    assert sum(size for use, size in ledger.items() if use != "used") == ledger["used"]
    assert all(size >= 0 for use, size in ledger.items() if use != "driver"), ledger
    engine.destroy()
