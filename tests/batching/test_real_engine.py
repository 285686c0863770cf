"""The pipelines over a real engine and a small model with random weights."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mii
from mii.api import async_pipeline
from mii.batching.async_pipeline import MIIAsyncPipeline
from mii.batching.data_classes import Response
from mii.batching.pipeline import MIIPipeline
from mii.config import ModelConfig
from mii.engine import Engine
from mii.errors import PipelineDestroyedError, PromptTooLongError, RequestError

OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
PROMPTS = ["DeepSpeed is", "a", "Seattle is a city in " * 6, "héllo 😀"]


@pytest.fixture(scope="module")
def pipe(tiny_llama: Path) -> Iterator[MIIPipeline]:
    with mii.pipeline(str(tiny_llama), device="cpu", dtype="fp32") as pipe:
        yield pipe


def is_idle(pipe: MIIPipeline | MIIAsyncPipeline) -> bool:
    """Nothing runs and every KV block is free."""
    engine = pipe.inference_engine
    assert isinstance(engine, Engine)
    stats = engine.stats()
    return not engine.has_work and stats.running == stats.waiting == 0 and stats.free_blocks == stats.num_blocks


def test_a_call_with_many_prompts_gives_what_each_gives_alone(pipe: MIIPipeline) -> None:
    together = pipe(PROMPTS, **OPTIONS)
    assert together == [pipe(prompt, **OPTIONS)[0] for prompt in PROMPTS]
    assert [response.generated_length for response in together if response.finish_reason == "length"]
    assert is_idle(pipe)


def test_token_ids_give_what_their_text_gives(pipe: MIIPipeline) -> None:
    ids = [pipe.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert pipe(ids, **OPTIONS) == pipe(PROMPTS, **OPTIONS) == pipe([np.array(each) for each in ids], **OPTIONS)


def test_texts_encoded_together_are_what_each_is_alone(pipe: MIIPipeline) -> None:
    texts = [*PROMPTS, "<s>a", "<s><s>a"]
    assert pipe.tokenizer.encode_batch(texts) == [pipe.tokenizer.encode(text) for text in texts]


def test_a_stream_joined_is_the_call(pipe: MIIPipeline) -> None:
    texts = [""] * len(PROMPTS)
    for pieces in pipe.stream(PROMPTS, **OPTIONS):
        for piece in pieces:
            texts[piece.index] += piece.generated_text
    assert texts == [response.generated_text for response in pipe(PROMPTS, **OPTIONS)]


def test_a_stop_string_cuts_the_text_and_frees_the_request(pipe: MIIPipeline) -> None:
    whole = pipe(PROMPTS[0], ignore_eos=True, **OPTIONS)[0].generated_text
    stop = whole[6:9]
    cut = pipe(PROMPTS[0], ignore_eos=True, stop=stop, **OPTIONS)[0]
    assert (cut.generated_text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert cut.generated_length < 24
    assert is_idle(pipe)


def test_sampling_repeats_with_a_seed_whatever_else_runs(pipe: MIIPipeline) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "seed": 11}
    alone = pipe("DeepSpeed is", **options)[0]
    assert pipe(["DeepSpeed is", "other", "third"], **options)[0] == alone
    assert pipe("DeepSpeed is", max_new_tokens=24, seed=12)[0] != alone


def test_threads_share_the_engine(pipe: MIIPipeline) -> None:
    expected = [pipe(prompt, **OPTIONS) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: pipe(prompt, **OPTIONS), PROMPTS * 2)) == expected * 2
    assert is_idle(pipe)


def test_ctrl_c_frees_every_block_and_the_pipeline_goes_on(pipe: MIIPipeline) -> None:
    expected = pipe("a", **OPTIONS)

    def interrupt(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPTS, streaming_fn=interrupt, max_new_tokens=200)
    assert is_idle(pipe)
    assert pipe("a", **OPTIONS) == expected


def test_a_refused_call_leaves_the_pipeline_usable(pipe: MIIPipeline) -> None:
    expected = pipe("a", **OPTIONS)
    with pytest.raises(PromptTooLongError, match="prompt 1 of 2"):
        pipe(["a", "b" * 4000], **OPTIONS)
    assert is_idle(pipe)
    assert pipe("a", **OPTIONS) == expected


def test_full_text_begins_with_the_prompt(pipe: MIIPipeline) -> None:
    for prompt, response in zip(PROMPTS, pipe(PROMPTS, return_full_text=True, **OPTIONS), strict=True):
        assert response.generated_text.startswith(prompt)
        assert response.generated_text.removeprefix(prompt) == pipe(prompt, **OPTIONS)[0].generated_text


def test_the_end_of_text_id_of_the_tokenizer_may_be_changed(pipe: MIIPipeline) -> None:
    """The known way to end Qwen's chats."""
    whole = pipe("a", ignore_eos=True, **OPTIONS)[0]
    letter = next(char for char in whole.generated_text if char.isascii())
    token = pipe.tokenizer.encode(letter)[-1]
    before = pipe.tokenizer.tokenizer.eos_token_id
    pipe.tokenizer.tokenizer.eos_token_id = token
    try:
        ended = pipe("a", **OPTIONS)[0]
    finally:
        pipe.tokenizer.tokenizer.eos_token_id = before
    assert ended.finish_reason == "stop"
    assert ended.generated_text == whole.generated_text[: whole.generated_text.index(letter)]


def test_an_async_pipeline_gives_what_a_pipeline_gives(pipe: MIIPipeline, tiny_llama: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_llama), device="cpu", dtype="fp32")
    other = async_pipeline(config)
    try:
        other.start()
        uids = {other.put_request(prompt, OPTIONS): prompt for prompt in PROMPTS}
        responses = {uids[uid]: response for uid, response in (other.get_response(60) for _ in PROMPTS)}
        assert [responses[prompt] for prompt in PROMPTS] == pipe(PROMPTS, **OPTIONS)
        uid = other.put_request("a", {"max_new_tokens": 400, "ignore_eos": True, "stream": True})
        other.get_response(60)
        other.flush_uid(uid)
    finally:
        other.shutdown()
    assert other.is_shutdown()
    with pytest.raises(PipelineDestroyedError):
        other.put_request("a")


def test_destroy_gives_the_engine_up(tiny_llama: Path) -> None:
    pipe = mii.pipeline(str(tiny_llama), device="cpu")
    pipe("a", max_new_tokens=2)
    pipe.destroy()
    pipe.destroy()
    with pytest.raises(PipelineDestroyedError):
        pipe("a")


SCORED: dict[str, Any] = {**OPTIONS, "logprobs": 2, "prompt_logprobs": 1, "frequency_penalty": 1.0}


def assert_scored(response: Response) -> None:
    assert response.logprobs is not None
    assert response.prompt_logprobs is not None
    assert len(response.logprobs) == response.generated_length
    assert len(response.prompt_logprobs) == response.prompt_length
    assert response.prompt_logprobs[0].logprob is None
    assert all((entry.logprob or 0.0) < 0 for entry in response.prompt_logprobs[1:])
    assert [len(entry.top) for entry in response.logprobs] == [2] * response.generated_length
    assert all(entry.top[0].logprob >= max(entry.logprob, entry.top[1].logprob) for entry in response.logprobs)


def test_log_probabilities_come_with_answers_and_say_their_text(pipe: MIIPipeline) -> None:
    responses = pipe(PROMPTS, **SCORED)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        assert_scored(response)
        ended = response.logprobs[:-1] if response.finish_reason == "stop" else response.logprobs
        assert b"".join(entry.token for entry in ended).decode(errors="replace") == response.generated_text
        assert b"".join(entry.token for entry in response.prompt_logprobs).decode().endswith(prompt)
    assert pipe(PROMPTS, **OPTIONS)[0].logprobs is None


def test_streamed_log_probabilities_joined_are_the_call_s(pipe: MIIPipeline) -> None:
    whole = pipe(PROMPTS, **SCORED)
    for index, prompt in enumerate(PROMPTS):
        pieces = [piece for pieces in pipe.stream(prompt, **SCORED) for piece in pieces]
        tokens = [entry.token_id for piece in pieces for entry in piece.logprobs or ()]
        assert tokens == [entry.token_id for entry in whole[index].logprobs]
        assert [piece.prompt_logprobs is not None for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_requests_of_a_thread_get_their_log_probabilities(tiny_llama: Path) -> None:
    pipe = async_pipeline(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu", dtype="fp32"))
    pipe.start()
    try:
        for prompt in PROMPTS:
            pipe.put_request(prompt, SCORED)
        for _ in PROMPTS:
            assert_scored(pipe.get_response()[1])
    finally:
        pipe.shutdown()


def test_an_impossible_option_names_its_prompt_and_leaves_the_pipeline_usable(pipe: MIIPipeline) -> None:
    with pytest.raises(RequestError, match=r"prompt 0 of 4 .*logit_bias: Token id 5000 is outside the vocabulary"):
        pipe(PROMPTS, logit_bias={"5000": 1}, **OPTIONS)
    assert is_idle(pipe)


def test_a_banned_token_is_never_said_and_allowed_ones_are_all_that_is(pipe: MIIPipeline) -> None:
    said = pipe("Hello", **OPTIONS, logprobs=0)[0].logprobs[0].token_id
    assert said not in [entry.token_id for entry in pipe("Hello", logit_bias={str(said): -100}, **SCORED)[0].logprobs]
    allowed = pipe.tokenizer.encode("xyz")[-3:]
    options = {"temperature": 2.0, "max_new_tokens": 24, "ignore_eos": True, "seed": 3}
    assert set(pipe("Hello", allowed_token_ids=allowed, **options)[0].generated_text) == set("xyz")
    ended = pipe("Hello", allowed_token_ids=allowed, stop_token_ids=allowed[:1], **options)[0]
    assert ended.finish_reason == "stop"
    assert set(ended.generated_text) <= {"y", "z"}
