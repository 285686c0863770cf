"""Penalties, biases, masks and log-probabilities on the card: with graphs, a step ahead of the host, and recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.engine import Engine
from tests.engine.test_special_requests import (
    ENDS,
    answers,
    assert_follows_the_oracle,
    assert_same_scores,
    assert_scores_are_the_models,
    run,
    special_requests,
    tokens,
)
from tests.oracle import Oracle, generate, random_prompts, small_engine


def card_engine(folder: Path, dtype: str = "fp32", **options: object) -> Engine:
    return small_engine(folder, device="cuda", dtype=dtype, **{"block_size": 16, **options})


def test_greedy_tokens_and_scores_follow_the_oracle(tiny_llama: Path) -> None:
    engine, oracle = card_engine(tiny_llama), Oracle(tiny_llama)
    sampling = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={9: 4.0, 200: -3.0}
    )
    allowed = SamplingParams(frequency_penalty=2.0, allowed_ids=tuple(range(50, 60)))
    requests = [
        EngineRequest(
            uid=uid, prompt_ids=prompt, max_new_tokens=30, min_new_tokens=uid, stop_ids=ENDS,
            sampling=allowed if uid % 3 == 0 else sampling, logprobs=uid % 4, prompt_logprobs=uid % 3,
        )
        for uid, prompt in enumerate(random_prompts(engine.vocab_size, [1, 5, 16, 17, 40, 33, 100, 3, 2]))
    ]  # fmt: skip
    for every in (0, 1, 2):  # eager, captured, replayed
        outputs = run(engine, requests, every)
        for request in requests:
            assert_follows_the_oracle(oracle, request, tokens(outputs[request.uid]))
            assert_scores_are_the_models(oracle, request, outputs[request.uid])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_replayed_step_gives_what_the_launched_one_gave(tiny_llama: Path, dtype: str) -> None:
    engine = card_engine(tiny_llama, dtype, prefix_caching=False)
    requests = special_requests(engine.vocab_size)
    launched, captured, replayed = (run(engine, requests, 0) for _ in range(3))
    assert answers(launched) == answers(captured) == answers(replayed)
    assert_same_scores(replayed, launched)


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(tiny_llama: Path) -> None:
    engine = card_engine(tiny_llama)
    requests = special_requests(engine.vocab_size)
    alone = {request.uid: run(engine, [request])[request.uid] for request in requests}
    for every in (0, 1, 3):
        together = run(engine, requests, every)
        assert answers(together) == answers(alone)
        assert_same_scores(together, alone)


def test_preemption_and_recomputation_change_nothing(tiny_llama: Path) -> None:
    roomy, tight = card_engine(tiny_llama), card_engine(tiny_llama, blocks=8)
    requests = special_requests(roomy.vocab_size)
    expected = run(roomy, requests)
    for every in (0, 1):
        got = run(tight, requests, every)
        assert answers(got) == answers(expected)
        assert_same_scores(got, expected)
    assert tight.stats().preemptions > 0


def test_nobody_waits_for_the_device_while_special_requests_decode(tiny_llama: Path) -> None:
    """Only the event of the step before is waited for; torch raises where anything else would synchronise."""
    engine = card_engine(tiny_llama)
    sampling = SamplingParams(
        temperature=1.0, frequency_penalty=1.0, logit_bias={9: 2.0}, allowed_ids=tuple(range(200))
    )
    for uid, prompt in enumerate(random_prompts(engine.vocab_size, [9, 20])):
        engine.add_request(EngineRequest(uid, prompt, 40, sampling=sampling, logprobs=3))
    for _ in range(8):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            assert engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for uid in range(2):
        engine.abort(uid)


def test_plain_requests_are_the_same_beside_special_ones(tiny_llama: Path) -> None:
    engine = card_engine(tiny_llama)
    prompts = random_prompts(engine.vocab_size, [9, 20, 33])
    plain = generate(engine, prompts, 20)
    requests = [
        *(EngineRequest(uid, prompt, 20) for uid, prompt in enumerate(prompts)),
        *(
            EngineRequest(uid + 3, p, 20, sampling=SamplingParams(presence_penalty=2.0))
            for uid, p in enumerate(prompts)
        ),
    ]
    together = answers(run(engine, requests, 0))
    assert [together[uid] for uid in range(3)] == plain
    assert [together[uid + 3] for uid in range(3)] != plain
