"""What requests with penalties, biases and scores leave behind, what ends them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.errors import RequestError
from tests.engine.test_special_requests import answers, one, run, tokens
from tests.oracle import random_prompts, small_engine


def test_requests_that_ask_for_nothing_leave_the_engine_as_it_was(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [20])[0]
    assert engine.runner is not None
    plain = tokens(one(engine, prompt))
    assert engine.runner._extras is None
    one(engine, prompt, sampling=SamplingParams(frequency_penalty=1.0), logprobs=2)
    assert engine.runner._extras is not None
    assert tokens(one(engine, prompt)) == plain
    assert engine.runner._extras is None


def test_rows_of_penalties_are_reused_and_grow(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, blocks=200, max_sequences=32, max_tokens=256)
    sampling = SamplingParams(frequency_penalty=1.0, repetition_penalty=1.2)
    prompts = random_prompts(engine.vocab_size, [5 + i % 7 for i in range(40)])
    requests = [
        EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=5 + uid % 9, sampling=sampling)
        for uid, prompt in enumerate(prompts)
    ]
    alone = {request.uid: run(engine, [request])[request.uid] for request in requests}
    for request in requests[:30]:
        engine.add_request(request)
    engine.step()
    engine.step()
    assert engine.runner is not None
    assert engine.runner._extras is not None
    penalties = engine.runner._extras._processor._penalties
    assert penalties is not None
    assert penalties.table.slots == 32
    for request in requests[:30]:
        engine.abort(request.uid)
    for every in (0, 1, 2):
        assert answers(run(engine, requests, every)) == answers(alone)


def test_a_prompt_that_is_scored_takes_nothing_from_the_cache_and_leaves_it_its_blocks(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [70])[0]
    first = one(engine, prompt, prompt_logprobs=2)
    hits = engine.stats().prefix_hit_tokens
    again = one(engine, prompt, prompt_logprobs=2)
    assert engine.stats().prefix_hit_tokens == hits == 0
    assert again == first
    plain = one(engine, prompt)
    assert engine.stats().prefix_hit_tokens == 64
    assert tokens(plain) == tokens(first)


def test_ends_of_a_request_s_own_are_held_back_and_end_it(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [9])[0]
    free = tokens(one(engine, prompt, 30))
    ends = (free[3], 9999)
    outputs = one(engine, prompt, 30, stop_ids=ends)
    assert tokens(outputs) == free[: free.index(free[3]) + 1]
    assert outputs[-1].finish_reason == "stop"
    held = tokens(one(engine, prompt, 30, stop_ids=ends, min_new_tokens=10))
    assert len(held) > 10
    assert free[3] not in held[:10]


def test_a_request_without_ends_is_not_held_back_from_any_token(make_checkpoint: Callable[..., Path]) -> None:
    engine = small_engine(make_checkpoint(generation={"eos_token_id": list(range(2, 200))}))
    prompt = random_prompts(engine.vocab_size, [9])[0]
    free = tokens(one(engine, prompt, 20))
    assert min(free) < 200
    assert tokens(one(engine, prompt, 20, min_new_tokens=20)) == free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampling": SamplingParams(logit_bias={261: 1.0})},
            "logit_bias: Token id 261 is outside the vocabulary of 261",
        ),
        ({"sampling": SamplingParams(logit_bias={-1: 1.0})}, "logit_bias: Token id -1"),
        ({"sampling": SamplingParams(allowed_ids=(5, 999))}, "allowed tokens: Token id 999 is outside"),
        ({"sampling": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty is 0.0; it must be above 0"),
        (
            {"sampling": SamplingParams(allowed_ids=(2,)), "stop_ids": (2, 3), "min_new_tokens": 4},
            "All allowed tokens end the answer",
        ),
        ({"logprobs": -1}, "logprobs is -1; 0 to 100"),
        ({"prompt_logprobs": 101}, "prompt_logprobs is 101; 0 to 100"),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama: Path, options: dict[str, Any], message: str) -> None:
    engine = small_engine(tiny_llama)
    with pytest.raises(RequestError, match=message):
        engine.add_request(EngineRequest(uid=1, prompt_ids=[5], max_new_tokens=4, **options))
    assert not engine.has_work


def test_more_alternatives_than_the_vocabulary_has_are_all_of_it(make_checkpoint: Callable[..., Path]) -> None:
    engine = small_engine(make_checkpoint(vocab_size=40, tokenizer=False))
    (entry,) = one(engine, [5, 6], 1, logprobs=100)[0].logprobs or ()
    assert sorted(each.token_id for each in entry.top) == list(range(40))
    assert sum(np.exp(each.logprob or 0.0) for each in entry.top) == pytest.approx(1.0, abs=1e-5)
