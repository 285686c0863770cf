"""Penalties, biases, masks and log-probabilities: exact, and the same whatever is batched, preempted or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from mii.batching.data_classes import EngineRequest, SamplingParams, TokenLogprob, TokenOutput
from mii.engine import Engine
from mii.ops.sampler import SamplingTable, sample_reference
from tests.oracle import Oracle, random_prompts, small_engine

GREEDY = SamplingParams()
ENDS = (2, 5, 7)


def run(engine: Engine, requests: list[EngineRequest], every: int = 1) -> dict[int, list[TokenOutput]]:
    """All outputs of each request; one is added every `every` steps."""
    outputs: dict[int, list[TokenOutput]] = {request.uid: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for _ in range(len(waiting) if every == 0 else 1):
            if waiting:
                engine.add_request(waiting.pop(0))
        for _ in range(max(1, every)):
            for output in engine.step() if engine.has_work else ():
                outputs[output.uid].append(output)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def one(engine: Engine, prompt: list[int], new_tokens: int = 16, **options: Any) -> list[TokenOutput]:
    return run(engine, [EngineRequest(uid=1, prompt_ids=prompt, max_new_tokens=new_tokens, **options)])[1]


def changed(logits: np.ndarray[Any, Any], prompt: list[int], answer: list[int], request: EngineRequest) -> Any:
    """The oracle: float32 logits [vocab] as the request's penalties, biases and masks make them, token by token."""
    sampling, out = request.sampling, logits.astype(np.float32).copy()
    repetition = np.float32(sampling.repetition_penalty)
    for token in set(prompt + answer):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in set(answer):
        penalty = np.float32(sampling.frequency_penalty) * np.float32(answer.count(token))
        out[token] -= penalty + np.float32(sampling.presence_penalty)
    for token, bias in sampling.logit_bias.items():
        out[token] += np.float32(bias)
    if sampling.allowed_ids:
        out[np.setdiff1d(np.arange(len(out)), sampling.allowed_ids)] = -np.inf
    if len(answer) < request.min_new_tokens:
        out[[token for token in request.stop_ids if token < len(out)]] = -np.inf
    return out


def assert_follows_the_oracle(oracle: Oracle, request: EngineRequest, answer: list[int]) -> None:
    """Each greedy token is the best one of transformers' logits, changed by the oracle's rules, but for rounding."""
    full = torch.tensor([request.prompt_ids + answer])
    with torch.inference_mode():
        logits = oracle.model(full).logits[0, len(request.prompt_ids) - 1 : -1].float().numpy()
    for at, (row, token) in enumerate(zip(logits, answer, strict=True)):
        best = changed(row, request.prompt_ids, answer[:at], request)
        assert best.max() - best[token] <= 2e-4, f"token {at}: {token} is behind by {best.max() - best[token]}"


choices = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, 2.0, -1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, 260), st.floats(-100, 100, width=32), max_size=6),
    allowed_ids=st.lists(st.integers(8, 260), max_size=9, unique=True).map(sorted).map(tuple),
)
a_request = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(st.integers(3, 260), min_size=1, max_size=50),
        "max_new_tokens": st.integers(1, 24),
        "min_new_tokens": st.integers(0, 12),
        "stop_ids": st.sampled_from([(), (2,), ENDS, (2, 9999)]),
        "sampling": st.one_of(st.just(GREEDY), choices),
        "logprobs": st.none() | st.integers(0, 5),
        "prompt_logprobs": st.none() | st.integers(0, 5),
    }
)


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Oracle:
    return Oracle(tiny_llama)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> list[Engine]:
    """One with room, and one whose cache is so small that sequences are preempted."""
    return [small_engine(tiny_llama), small_engine(tiny_llama, blocks=9, max_tokens=24)]


@given(requests=st.lists(a_request, min_size=1, max_size=6), every=st.integers(0, 2), tight=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_greedy_tokens_of_any_mix_follow_the_oracle(
    engines: list[Engine], oracle: Oracle, requests: list[dict[str, Any]], every: int, tight: bool
) -> None:
    made = [EngineRequest(uid=uid, **fields) for uid, fields in enumerate(requests)]
    outputs = run(engines[tight], made, every)
    for request in made:
        answer = tokens(outputs[request.uid])
        assert 1 <= len(answer) <= request.max_new_tokens
        assert_follows_the_oracle(oracle, request, answer)
        assert (outputs[request.uid][-1].finish_reason == "stop") == (
            answer[-1] in request.stop_ids and len(answer) > request.min_new_tokens
        )
        assert_scores_are_the_models(oracle, request, outputs[request.uid])


def assert_scores_are_the_models(oracle: Oracle, request: EngineRequest, outputs: list[TokenOutput]) -> None:
    """Log-probabilities of answer and prompt are those of transformers' logits."""
    prompt, answer = request.prompt_ids, tokens(outputs)
    with torch.inference_mode():
        expected = oracle.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(1)
    entries = [entry for output in outputs for entry in output.logprobs or ()]
    if request.logprobs is None:
        assert not entries
    else:
        assert all(len(output.logprobs or ()) == len(output.token_ids) for output in outputs)
        assert_entries(entries, answer, expected[len(prompt) - 1 : -1], request.logprobs)
    assert [output.prompt_logprobs for output in outputs[1:]] == [None] * (len(outputs) - 1)
    prompt_entries = outputs[0].prompt_logprobs
    if request.prompt_logprobs is None:
        assert prompt_entries is None
    else:
        assert prompt_entries is not None
        assert prompt_entries[0] == TokenLogprob(prompt[0], None)
        assert_entries(prompt_entries[1:], prompt[1:], expected[: len(prompt) - 1], request.prompt_logprobs)


def assert_entries(entries: list[TokenLogprob], ids: list[int], expected: torch.Tensor, count: int) -> None:
    assert [entry.token_id for entry in entries] == ids
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert len(entry.top) == count
        best = row.topk(count).values.tolist() if count else []
        assert [each.logprob for each in entry.top] == pytest.approx(best, abs=1e-4)
        assert [row[each.token_id].item() for each in entry.top] == pytest.approx(best, abs=1e-4)
        assert len({each.token_id for each in entry.top}) == count


@pytest.mark.parametrize("penalty", [0.8, 1.2, 1.7])
def test_repetition_penalty_and_biases_give_transformers_own_answers(
    tiny_llama: Path, oracle: Oracle, penalty: float
) -> None:
    engine = small_engine(tiny_llama)
    bias = {9: 4.0, 200: -3.0, 77: 1.5}
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            SequenceBiasLogitsProcessor({(token,): b for token, b in bias.items()}),
        ]
    )
    for prompt in random_prompts(engine.vocab_size, [1, 17, 40]):
        expected = oracle.greedy(prompt, 30, logits_processor=processors)
        sampling = SamplingParams(repetition_penalty=penalty, logit_bias=bias)
        assert tokens(one(engine, prompt, 30, sampling=sampling)) == expected


@pytest.mark.parametrize("vocab", [261, 5000])
def test_draws_are_the_sampler_s_from_changed_logits(make_checkpoint: Callable[..., Path], vocab: int) -> None:
    folder = make_checkpoint(vocab_size=vocab, std=0.05)
    engine, oracle = small_engine(folder), Oracle(folder)
    sampling = SamplingParams(
        1.2,
        50,
        0.95,
        0.01,
        99,
        repetition_penalty=1.4,
        frequency_penalty=0.7,
        presence_penalty=0.4,
        logit_bias={5: 3.0},
    )
    table = SamplingTable.allocate(1)
    table.assign([0], [sampling])
    for prompt in random_prompts(vocab, [4, 33]):
        request = EngineRequest(1, prompt, 25, min_new_tokens=20, stop_ids=(5,), sampling=sampling, logprobs=1)
        answer = tokens(run(engine, [request])[1])
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].numpy()
        for at, row in enumerate(logits):
            drawn, wanted = torch.zeros(1, dtype=torch.int32), torch.tensor(changed(row, prompt, answer[:at], request))
            slot = torch.zeros(1, dtype=torch.int32)
            sample_reference(drawn, wanted.unsqueeze(0), table, slot, torch.tensor([len(prompt) + at]).int())
            assert drawn.item() == answer[at]


SPECIAL: list[dict[str, Any]] = [
    {"sampling": SamplingParams(temperature=1.5, seed=11, frequency_penalty=1.0, repetition_penalty=1.3)},
    {"sampling": SamplingParams(temperature=1.5, top_p=0.9, seed=12)},
    {"sampling": SamplingParams(presence_penalty=2.0), "logprobs": 3, "prompt_logprobs": 2},
    {"sampling": SamplingParams(temperature=1.0, seed=5, logit_bias={40: 6.0, 41: 5.0}), "logprobs": 0},
    {"sampling": SamplingParams(temperature=2.0, seed=6, allowed_ids=tuple(range(50, 90)))},
    {"sampling": SamplingParams(temperature=2.0, seed=7), "stop_ids": ENDS, "min_new_tokens": 10, "prompt_logprobs": 0},
    {},
]


def special_requests(vocab: int) -> list[EngineRequest]:
    prompts = random_prompts(vocab, [30, 25, 40, 12, 3, 21, 1])
    return [
        EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=40, **options)
        for uid, (prompt, options) in enumerate(zip(prompts, SPECIAL, strict=True))
    ]


def answers(outputs: dict[int, list[TokenOutput]]) -> dict[int, list[int]]:
    return {uid: tokens(theirs) for uid, theirs in outputs.items()}


def prompt_scores(outputs: dict[int, list[TokenOutput]]) -> list[float | None]:
    entries = [each for theirs in outputs.values() for output in theirs for each in output.prompt_logprobs or ()]
    return [entry.logprob for entry in entries]


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    requests = special_requests(engine.vocab_size)
    alone = {request.uid: run(engine, [request])[request.uid] for request in requests}
    for every in (0, 1, 3):
        together = run(engine, requests, every)
        assert answers(together) == answers(alone)
        assert prompt_scores(together)[1:] == pytest.approx(prompt_scores(alone)[1:], abs=1e-4, nan_ok=False)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_and_recomputation_change_nothing(tiny_llama: Path, prefix_caching: bool) -> None:
    roomy = small_engine(tiny_llama, prefix_caching=prefix_caching)
    tight = small_engine(tiny_llama, blocks=8, prefix_caching=prefix_caching)
    requests = special_requests(roomy.vocab_size)
    expected = run(roomy, requests)
    for every in (0, 1):
        got = run(tight, requests, every)
        assert answers(got) == answers(expected)
        assert_same_scores(got, expected)
    assert tight.stats().preemptions > 0 == roomy.stats().preemptions


def assert_same_scores(got: dict[int, list[TokenOutput]], expected: dict[int, list[TokenOutput]]) -> None:
    """Log-probabilities by value, since a token that is fed in another chunk may differ by rounding."""
    for uid, theirs in expected.items():
        for one_, other in zip(got[uid], theirs, strict=True):
            for name in ("logprobs", "prompt_logprobs"):
                mine, their = getattr(one_, name), getattr(other, name)
                assert (mine is None) == (their is None)
                for a, b in zip(mine or (), their or (), strict=True):
                    assert a.token_id == b.token_id
                    assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))


def test_an_interrupted_step_changes_no_answer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(tiny_llama)
    requests = special_requests(engine.vocab_size)
    expected = run(engine, requests, 0)
    assert engine.runner is not None
    launch, got, steps = engine.runner.launch, {request.uid: [] for request in requests}, 0

    def interrupt(plan: object) -> None:
        raise KeyboardInterrupt

    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        steps += 1
        if steps % 4 == 0:
            monkeypatch.setattr(engine.runner, "launch", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            monkeypatch.setattr(engine.runner, "launch", launch)
        for output in engine.step():
            got[output.uid].append(output)
    assert answers(got) == answers(expected)
    assert_same_scores(got, expected)


@pytest.mark.parametrize("blocks", [96, 8])
def test_answers_are_the_same_when_the_host_is_a_step_behind(tiny_llama: Path, blocks: int) -> None:
    """As on a GPU: a step is launched before the tokens of the one before are read."""
    plain, behind = small_engine(tiny_llama), small_engine(tiny_llama, blocks=blocks)
    requests = special_requests(plain.vocab_size)
    expected = run(plain, requests)
    run_a_step_behind(behind)
    for every in (0, 1):
        got = run(behind, requests, every)
        assert answers(got) == answers(expected)
        assert_same_scores(got, expected)
    assert (behind.stats().preemptions > 0) == (blocks < 96)


def run_a_step_behind(engine: Engine) -> None:
    """Lets the engine overlap on the CPU; results are copied, since two steps share the memory they land in."""
    assert engine.runner is not None
    engine._overlapped = True
    read_back = engine.runner.sampled.read_back

    def copied() -> Any:
        ids, event = read_back()
        return ids.clone(), event

    engine.runner.sampled.read_back = copied  # type: ignore[method-assign]
