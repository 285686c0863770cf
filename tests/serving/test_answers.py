"""What waits at an HTTP server for a reader, and what need not wait."""

from __future__ import annotations

from typing import Any

from mii.grpc_related.answers import Answers, Piece, merged
from mii.grpc_related.proto.modelresponse_pb2 import TokenLogprob
from tests.serving.calls import in_loop


def piece(index: int, text: str, tokens: int, reason: str = "none", logprobs: int = 0) -> Piece:
    entries = [TokenLogprob(token_id=at) for at in range(logprobs)]
    return Piece(index=index, response=text, generated_tokens=tokens, finish_reason=reason, logprobs=entries)


def test_pieces_that_wait_are_merged_by_answer_and_last_pieces_stay() -> None:
    waiting = [piece(0, "a", 1, logprobs=1), piece(1, "x", 1), piece(0, "b", 2, logprobs=2), piece(0, "", 2, "stop")]
    first, second, last = merged(waiting)
    assert (first.response, first.generated_tokens, len(first.logprobs)) == ("ab", 2, 3)
    assert (second.index, second.response) == (1, "x")
    assert (last.index, last.finish_reason) == (0, "stop")


def test_a_reader_who_never_comes_has_as_much_waiting_as_there_is_text() -> None:
    async def main() -> None:
        answers = Answers(1)
        for number in range(10_000):
            answers.push([piece(0, "x", number + 1)])
        waiting = await answers.take()
        assert "".join(each.response for each in waiting) == "x" * 10_000
        assert len(waiting) <= 17

    in_loop(main())


def test_what_comes_is_offered_unless_something_waits() -> None:
    async def main() -> None:
        answers, offered, takes = Answers(1), [], True

        def offer(pieces: Any) -> bool:
            offered.extend(each.response for each in pieces)
            return takes

        answers.push([piece(0, "a", 1)])
        answers.listen(lambda: None, offer)
        answers.push([piece(0, "b", 2)])
        assert offered == []  # it would come before what waits
        assert [each.response for each in answers.take_now()] == ["a", "b"]
        answers.push([piece(0, "c", 3)])
        assert offered == ["c"] and answers.take_now() == []
        takes = False
        answers.push([piece(0, "d", 4)])
        assert [each.response for each in answers.take_now()] == ["d"]

    in_loop(main())
