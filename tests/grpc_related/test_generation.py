"""What a call's reader gets: merged pieces in its turn, a last one each, errors at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mii.batching.data_classes import EngineRequest, GenerationFinishReason, TokenLogprob
from mii.batching.generation.stops import StopStrings
from mii.batching.intake import PreparedRequest
from mii.batching.tracker import TextEvent
from mii.errors import ServerUnavailableError
from mii.grpc_related.generation import Generation, Piece
from mii.grpc_related.pacer import Pacer

LENGTH = GenerationFinishReason.LENGTH


def prepared(count: int, text: str | None = None) -> list[PreparedRequest]:
    return [
        PreparedRequest(EngineRequest(7 + index, [1, 2, 3], 10), index, text, StopStrings()) for index in range(count)
    ]


def token(generation: Generation, uid: int, text: str, length: int, last: bool = False) -> None:
    reason = LENGTH if last else GenerationFinishReason.NONE
    generation.push(TextEvent(uid, text, 1, length, reason), 10.0 + length)


def streaming(count: int, **options: Any) -> Generation:
    return Generation(prepared(count), 10.0, options.get("places"), Pacer(1e6, 1000))


def test_what_is_not_taken_is_one_piece() -> None:
    async def run() -> tuple[Any, Any, Any]:
        generation = streaming(2)
        for length in range(1, 1001):
            token(generation, 7, "ab", length)
        token(generation, 8, "x", 1)
        first = await generation.take()
        token(generation, 7, "!", 1001, last=True)
        token(generation, 8, "", 2, last=True)
        return first, await generation.take(), await generation.take()

    first, second, third = asyncio.run(run())
    assert first == ([Piece(0, "ab" * 1000, 3, 1000, 999.0), Piece(1, "x", 3, 1)], [])
    assert second == (
        [Piece(0, "!", 3, 1001, 1000.0), Piece(1, "", 3, 2, 1.0)],
        [Piece(0, "", 3, 1001, 1000.0, LENGTH), Piece(1, "", 3, 2, 1.0, LENGTH)],
    )
    assert third == ([], [])


def test_a_reader_sleeps_until_something_comes() -> None:
    async def run() -> Any:
        generation = streaming(1)
        reading = asyncio.create_task(generation.take())
        await asyncio.sleep(0.01)
        assert not reading.done()
        token(generation, 7, "a", 1)
        return await reading

    assert asyncio.run(run())[0][0].text == "a"


def test_an_end_without_a_token_is_a_last_piece_alone() -> None:
    async def run() -> Any:
        generation = streaming(1)
        token(generation, 7, "a", 1)
        await generation.take()
        generation.push(TextEvent(7, "", 0, 1, error="no more"), 12.0)
        return await generation.take()

    pieces, last = asyncio.run(run())
    assert pieces == [] and last[0].error == "no more"


def test_pieces_have_the_places_that_the_client_gave() -> None:
    async def run() -> Any:
        generation = streaming(2, places=[5, 3])
        token(generation, 7, "a", 1, last=True)
        token(generation, 8, "b", 1, last=True)
        return await generation.take()

    assert [(piece.index, piece.text) for piece in asyncio.run(run())[0]] == [(5, "a"), (3, "b")]


def test_log_probabilities_of_what_is_merged_come_together() -> None:
    def scored(generation: Generation, length: int, **more: Any) -> None:
        entry = TokenLogprob(length, -0.5, (), b"a")
        generation.push(TextEvent(7, "a", 1, length, logprobs=[entry], **more), 10.0)

    async def run() -> Any:
        generation = streaming(1)
        scored(generation, 1, prompt_logprobs=[TokenLogprob(9, None)])
        scored(generation, 2)
        (first,), _ = await generation.take()
        scored(generation, 3)
        (second,), _ = await generation.take()
        return first, second

    first, second = asyncio.run(run())
    assert [entry.token_id for entry in first.logprobs] == [1, 2]
    assert [entry.token_id for entry in first.prompt_logprobs] == [9]
    assert [entry.token_id for entry in second.logprobs] == [3] and second.prompt_logprobs is None


def test_a_failure_comes_before_what_was_not_taken() -> None:
    async def run() -> None:
        generation = streaming(1)
        token(generation, 7, "a", 1)
        generation.fail(ServerUnavailableError("gone"))
        with pytest.raises(ServerUnavailableError, match="gone"):
            await generation.take()
        reading = asyncio.create_task(streaming(1).take())
        await asyncio.sleep(0)
        reading.cancel()

    asyncio.run(run())


def test_all_waits_for_every_answer_and_puts_the_prompt_before_it_where_wanted() -> None:
    async def run() -> Any:
        generation = Generation(prepared(2, "Q: "), 10.0, None, None)
        reading = asyncio.create_task(generation.all())
        token(generation, 8, "b", 1, last=True)
        await asyncio.sleep(0.01)
        assert not reading.done() and generation.open == [7]
        token(generation, 7, "a", 1)
        token(generation, 7, "a", 2, last=True)
        return await reading

    assert [(piece.index, piece.text, piece.finish_reason) for piece in asyncio.run(run())] == [
        (0, "Q: aa", LENGTH),
        (1, "Q: b", LENGTH),
    ]


def test_a_failure_ends_a_reader_who_waits() -> None:
    async def run() -> None:
        for streams in (True, False):
            generation = streaming(1) if streams else Generation(prepared(1), 10.0, None, None)
            reading = asyncio.create_task(generation.take() if streams else generation.all())
            await asyncio.sleep(0)
            generation.fail(ServerUnavailableError("gone"))
            with pytest.raises(ServerUnavailableError):
                await asyncio.wait_for(reading, 1)

    asyncio.run(run())
