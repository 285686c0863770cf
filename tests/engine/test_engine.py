"""The engine's promises: batching, preemption, prefix reuse and interruption change no token of anybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.engine import Engine
from mii.errors import PipelineDestroyedError, PromptTooLongError, RequestError
from tests.oracle import Oracle, drain, generate, random_prompts, small_engine


def request(uid: int, prompt: list[int], new_tokens: int = 8, **options: object) -> EngineRequest:
    return EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=new_tokens, **options)  # type: ignore[arg-type]


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


def test_64_mixed_requests_in_one_call_equal_one_by_one(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, max_tokens=96, max_sequences=48, blocks=256)
    prompts = random_prompts(engine.vocab_size, [1 + (7 * i) % 61 for i in range(64)])
    together = generate(engine, prompts, 12)
    alone = [generate(engine, [prompt], 12)[0] for prompt in prompts]
    assert together == alone
    assert_nothing_is_held(engine)


def test_sampled_text_does_not_depend_on_who_else_is_in_the_batch(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompts = random_prompts(engine.vocab_size, [9, 3, 20])
    sampling = SamplingParams(temperature=1.3, top_p=0.9, seed=77)
    together = generate(engine, prompts, 20, sampling=sampling)
    alone = [generate(engine, [prompt], 20, sampling=sampling)[0] for prompt in prompts]
    assert together == alone
    other = generate(engine, prompts, 20, sampling=SamplingParams(temperature=1.3, top_p=0.9, seed=78))
    assert other != together


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_forced_preemption_loses_nothing(tiny_llama: Path, prefix_caching: bool) -> None:
    roomy = small_engine(tiny_llama, prefix_caching=prefix_caching)
    tight = small_engine(tiny_llama, blocks=9, prefix_caching=prefix_caching)
    prompts = random_prompts(roomy.vocab_size, [30, 25, 40, 12])
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=5)):
        assert generate(tight, prompts, 60, sampling=sampling) == generate(roomy, prompts, 60, sampling=sampling)
    assert tight.stats().preemptions > 0 == roomy.stats().preemptions
    assert_nothing_is_held(tight)


def test_a_shared_prefix_is_reused_and_changes_nothing(tiny_llama: Path) -> None:
    engine, plain = small_engine(tiny_llama), small_engine(tiny_llama, prefix_caching=False)
    common, *tails = random_prompts(engine.vocab_size, [50, 3, 9, 1])
    prompts = [common + tail for tail in tails]
    expected = generate(plain, prompts, 10)
    assert generate(engine, prompts, 10) == expected
    hits = engine.stats().prefix_hit_tokens
    assert generate(engine, prompts, 10) == expected
    assert engine.stats().prefix_hit_tokens >= hits + 3 * 48


def test_prompts_rotated_by_their_length_share_no_blocks(make_checkpoint: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_checkpoint(rope_parameters=rope, max_position_embeddings=24)
    engine, oracle = small_engine(folder), Oracle(folder)
    long = random_prompts(engine.vocab_size, [60])[0]
    for prompt in (long, long[:40], long[:20], long):
        assert generate(engine, [prompt], 8)[0] == oracle.greedy(prompt, 8)


def test_a_request_ends_at_any_of_its_stop_ids_and_counts_the_token(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [6])[0]
    free = generate(engine, [prompt], 20)[0]
    stop = free[5]
    first = free.index(stop)
    engine.add_request(request(0, prompt, 20, stop_ids=(stop, 9999)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.token_ids[0] for output in outputs] == free[: first + 1]
    assert [output.finish_reason for output in outputs] == [None] * first + ["stop"]


def test_tokens_end_a_request_as_long_as_one_that_names_them_runs_and_are_forgotten_after_it(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [6])[0]
    free = generate(engine, [prompt], 20)[0]
    stop = free[5]
    first = free.index(stop)
    engine.add_request(request(0, prompt, 20, stop_ids=(stop, stop, 9999, -1)))
    engine.add_request(request(1, prompt, 20, stop_ids=(stop,)))
    engine.abort(0)
    assert drain(engine, 2)[1] == free[: first + 1]
    assert generate(engine, [prompt], 20)[0] == free
    assert not engine._ends.any()


def test_end_of_text_is_not_chosen_below_min_new_tokens(make_checkpoint: Callable[..., Path]) -> None:
    ends = list(range(2, 40))
    engine = small_engine(make_checkpoint(generation={"eos_token_id": ends}))
    prompts = random_prompts(engine.vocab_size, [4] * 12, seed=3)
    sampling = SamplingParams(temperature=3.0, seed=1)
    free = generate(engine, prompts, 40, sampling=sampling, stop_ids=engine.stop_ids)
    assert min(map(len, free)) < 20, "the test needs answers that end early by themselves"
    held = generate(engine, prompts, 40, sampling=sampling, stop_ids=engine.stop_ids, min_new_tokens=20)
    assert all(len(answer) > 20 and not set(answer[:20]) & set(ends) for answer in held)
    assert any(len(answer) < 40 for answer in held)


def test_finish_reason_is_length_at_the_limit(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, max_length=32)
    engine.add_request(request(0, random_prompts(engine.vocab_size, [30])[0], 50))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert len(outputs) == 2
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"prompt_ids": []}, RequestError, "no tokens"),
        ({"prompt_ids": [5, 100000]}, RequestError, "Token id 100000 is outside the vocabulary of 261 tokens"),
        ({"prompt_ids": [-1]}, RequestError, "Token id -1 is outside"),
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens is 0"),
        ({"uid": 1}, RequestError, "Request 1 is already running"),
        ({"prompt_ids": [5] * 600}, PromptTooLongError, "600 tokens and the model takes 512"),
        (
            {"prompt_ids": [5] * 200},
            PromptTooLongError,
            r"200 tokens and the whole KV cache holds 160 \(10 blocks of 16\)",
        ),
    ],
)
def test_a_request_that_cannot_run_is_refused_at_once_and_costs_nobody(
    tiny_llama: Path, bad: dict[str, object], error: type[Exception], message: str
) -> None:
    engine = small_engine(tiny_llama, blocks=10)
    prompt = random_prompts(engine.vocab_size, [9])[0]
    expected = generate(engine, [prompt], 8)[0]
    engine.add_request(request(1, prompt))
    engine.step()
    with pytest.raises(error, match=message):
        engine.add_request(EngineRequest(**{"uid": 2, "prompt_ids": [5], "max_new_tokens": 4, **bad}))  # type: ignore[arg-type]
    answer = []
    while engine.has_work:
        answer += [token for output in engine.step() for token in output.token_ids]
    assert len(answer) in (7, 8)
    assert answer[-7:] == expected[1:]


def test_abort_frees_everything_and_may_be_repeated(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompts = random_prompts(engine.vocab_size, [20, 50, 70])
    for uid, prompt in enumerate(prompts):
        engine.add_request(request(uid, prompt, 30))
    engine.step()
    engine.step()
    for uid in (0, 1, 1, 2, 99):
        engine.abort(uid)
    assert not engine.has_work
    assert_nothing_is_held(engine)


def test_an_interrupted_step_changes_no_text(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(tiny_llama)
    prompts = random_prompts(engine.vocab_size, [20, 50, 7])
    sampling = SamplingParams(temperature=1.0, seed=3)
    expected = generate(engine, prompts, 12, sampling=sampling)
    for uid, prompt in enumerate(prompts):
        engine.add_request(request(uid, prompt, 12, sampling=sampling))
    answers: list[list[int]] = [[] for _ in prompts]
    assert engine.runner is not None
    launch, steps = engine.runner.launch, 0
    while engine.has_work:
        steps += 1
        if steps % 3 == 0:
            monkeypatch.setattr(engine.runner, "launch", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            monkeypatch.setattr(engine.runner, "launch", launch)
        for output in engine.step():
            answers[output.uid] += output.token_ids
    assert answers == expected
    assert_nothing_is_held(engine)


def _interrupt(plan: object) -> None:
    raise KeyboardInterrupt


def test_destroy_is_harmless_twice_and_use_after_it_is_an_error(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    engine.destroy()
    engine.destroy()
    for use in (lambda: engine.add_request(request(0, [5])), engine.step, lambda: engine.put([0], [[5]])):
        with pytest.raises(PipelineDestroyedError, match="destroyed"):
            use()


def test_prompt_ids_given_stay_as_they_were(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    prompt = [5, 6, 7]
    engine.add_request(request(0, prompt))
    drain(engine, 1)
    assert prompt == [5, 6, 7]
