"""A replica over a real engine: its greedy answers are the pipeline's, and nothing stays in the engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import mii
from mii.batching.data_classes import TokenLogprob
from mii.grpc_related.convert import pack_request, read_logprobs
from mii.launch.process import Progress
from tests.serving.calls import ask, connected, in_loop, status, stream
from tests.serving.deployments import wait_until
from tests.serving.replicas import ENGINE, Replica, running_replica

QUEUE = 48
WORDS = ["the", "a", "one", "two", "red", "dog", "house", "of", "and", "then", "12", "?", "!", "Ä", "漢", "🙂"]


@pytest.fixture(scope="module")
def replica(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("r") / "d"
    model = {"block_size": 16, "memory_fraction": 0.01}
    with running_replica(folder, tiny_llama, engine=ENGINE, model_options=model, queue_size=QUEUE) as replica:
        yield replica


def some_prompts(count: int) -> list[str]:
    chance = random.Random(3)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 40))) for _ in range(count)]


def expected_texts(model: Path, prompts: list[str], lengths: list[int]) -> list[str]:
    """Greedy answers of the pipeline."""
    texts = [""] * len(prompts)
    with mii.pipeline(str(model), device="cpu") as pipe:
        for length in set(lengths):
            places = [place for place, own in enumerate(lengths) if own == length]
            answers = pipe([prompts[place] for place in places], do_sample=False, max_new_tokens=length)
            for place, answer in zip(places, answers, strict=True):
                texts[place] = answer.generated_text
    return texts


def test_mixed_calls_beyond_the_queue_each_get_their_own_answer(replica: Replica, tiny_llama: Path) -> None:
    """Greedy ones equal the pipeline's, seeded ones repeat, bad ones are refused, given up ones disturb nobody."""
    prompts = some_prompts(120)
    lengths = [(1, 8, 20)[number // 6 % 3] for number in range(len(prompts))]
    greedy = expected_texts(tiny_llama, prompts, lengths)

    async def one(stub: Any, number: int) -> None:
        """One call, again while the queue is full."""
        while await attempt(stub, number) is grpc.StatusCode.RESOURCE_EXHAUSTED:
            await asyncio.sleep(0.05)

    async def attempt(stub: Any, number: int) -> grpc.StatusCode:
        """The status of a call whose kind depends on its number; its answer is right."""
        prompt, length, kind = [prompts[number]], lengths[number], number % 6
        try:
            if kind == 0:
                await ask(stub, prompt, max_length=1)
            elif kind == 1:
                options = {"seed": number, "temperature": 0.8, "top_k": 5, "max_new_tokens": length}
                first, second = await ask(stub, prompt, **options), await ask(stub, prompt, **options)
                assert first[0].response == second[0].response
            elif kind == 2:
                await ask(stub, prompt, 0.05, max_new_tokens=300)
            elif kind % 2:
                streamed = await stream(stub, prompt, do_sample=False, max_new_tokens=length)
                assert streamed.texts.get(0, "") == greedy[number]
            else:
                (reply,) = await ask(stub, prompt, do_sample=False, max_new_tokens=length)
                assert reply.response == greedy[number]
        except grpc.aio.AioRpcError as error:
            expected = {0: grpc.StatusCode.INVALID_ARGUMENT, 2: grpc.StatusCode.DEADLINE_EXCEEDED}
            allowed = (grpc.StatusCode.RESOURCE_EXHAUSTED, expected.get(kind))
            if error.code() not in allowed:
                raise
            return error.code()
        return grpc.StatusCode.OK

    async def read(replies: AsyncIterator[Any]) -> None:
        async for _ in replies:
            pass

    async def run() -> None:
        async with connected(replica.address) as stub:
            options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 300}
            filling = aiter(stub.GeneratorReplyStream(pack_request(["one"] * QUEUE, options)))
            await anext(filling)
            await asyncio.gather(read(filling), *[one(stub, number) for number in range(len(prompts))])

    in_loop(run(), 120.0)
    counts = replica.wait_idle()
    assert counts["calls"]["RESOURCE_EXHAUSTED"] > 0


def test_one_call_with_many_prompts_is_the_pipelines(replica: Replica, tiny_llama: Path) -> None:
    prompts = some_prompts(100)
    greedy = expected_texts(tiny_llama, prompts, [12] * len(prompts))

    async def run() -> tuple[list[Any], Any]:
        async with connected(replica.address) as stub:
            options = {"do_sample": False, "max_new_tokens": 12}
            return await ask(stub, prompts, **options), await stream(stub, prompts, **options)

    replies, streamed = in_loop(run(), 120.0)
    assert [reply.response for reply in replies] == greedy
    assert [streamed.texts.get(place, "") for place in range(len(prompts))] == greedy


def test_log_probabilities_are_the_pipelines(replica: Replica, tiny_llama: Path) -> None:
    prompts = ["one dog", "Ä 漢"]
    options = {"do_sample": False, "max_new_tokens": 6, "logprobs": 2, "prompt_logprobs": 1}
    with mii.pipeline(str(tiny_llama), device="cpu") as pipe:
        expected = pipe(prompts, **options)

    async def run() -> tuple[list[Any], list[Any]]:
        async with connected(replica.address) as stub:
            pieces = []
            async for reply in stub.GeneratorReplyStream(pack_request(prompts, options)):
                pieces.extend(reply.response)
            return await ask(stub, prompts, **options), pieces

    replies, pieces = in_loop(run())
    for place, answer in enumerate(expected):
        own = [piece for piece in pieces if piece.index == place]
        for given in ([replies[place]], own):
            assert_same_scores([entry for piece in given for entry in piece.logprobs], answer.logprobs)
            assert_same_scores([entry for piece in given for entry in piece.prompt_logprobs], answer.prompt_logprobs)
        assert b"".join(entry.token for entry in replies[place].prompt_logprobs).decode() == prompts[place]


def assert_same_scores(entries: list[Any], expected: list[TokenLogprob] | None) -> None:
    read = read_logprobs(entries)
    assert read is not None and expected is not None
    assert [(each.token_id, each.token) for each in read] == [(each.token_id, each.token) for each in expected]
    for mine, theirs in zip(read, expected, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [each.token_id for each in mine.top] == [each.token_id for each in theirs.top]


def test_prompts_and_answers_up_to_the_models_limit(replica: Replica) -> None:
    async def run() -> tuple[Any, Any, Any]:
        async with connected(replica.address) as stub:
            fits = await ask(stub, ["x" * 500], do_sample=False, ignore_eos=True)
            exact = await ask(stub, ["x" * 511], do_sample=False)
            return fits[0], exact[0], await status(ask(stub, ["x" * 512]))

    fits, exact, error = in_loop(run())
    assert (fits.prompt_tokens, fits.generated_tokens, fits.finish_reason) == (500, 12, "length")
    assert exact.generated_tokens == 1
    assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT and "512" in (error.details() or "")


def test_the_engine_reports_its_progress_and_sleeps_when_idle(replica: Replica) -> None:
    stages = {
        message.stage for role, message in replica.said if role.endswith("engine") and isinstance(message, Progress)
    }
    assert "weights" in stages
    replica.wait_idle()

    def used() -> float:
        fields = Path(f"/proc/{replica.engine.state.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # in hundredths of a second

    def in_a_second() -> float:
        before = used()
        time.sleep(1.0)
        return used() - before

    seen: list[float] = []  # threads that look for more work give up after a while
    wait_until(lambda: seen.append(in_a_second()) or seen[-1] <= 5, 20, seen=lambda: seen)


def test_smollm2_answers_as_in_the_pipeline(smollm2: Path, tmp_path: Path) -> None:
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a land far away,"]
    greedy = expected_texts(smollm2, prompts, [16] * 3)
    with running_replica(tmp_path / "d", smollm2, engine=ENGINE) as replica:

        async def run() -> tuple[list[Any], Any]:
            async with connected(replica.address) as stub:
                options = {"do_sample": False, "max_new_tokens": 16}
                return await ask(stub, prompts, **options), await stream(stub, prompts, **options)

        replies, streamed = in_loop(run())
        replica.wait_idle()
    assert [reply.response for reply in replies] == greedy
    assert [streamed.texts[place] for place in range(3)] == greedy
