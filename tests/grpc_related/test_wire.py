"""Pieces as bytes are what protobuf makes of them."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mii.grpc_related.proto.modelresponse_pb2 import CallReply, ServerMessage, SingleGenerationReply
from mii.grpc_related.wire import reply_bytes, running_bytes

NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**31 - 1))
SECONDS = st.floats(0, 1e6, width=32)


@given(st.integers(0, 2**40), st.text(max_size=300), NUMBERS, SECONDS, SECONDS, NUMBERS, NUMBERS)
def test_a_running_piece_reads_as_it_was_written(
    call: int, text: str, generated: int, seconds: float, model_seconds: float, index: int, prompt: int
) -> None:
    piece = SingleGenerationReply(
        response=text,
        finish_reason="none",
        prompt_tokens=prompt,
        generated_tokens=generated,
        time_taken=seconds,
        model_time_taken=model_seconds,
        index=index,
    )
    raw = running_bytes(call, text, generated, seconds, model_seconds, index, prompt)
    assert ServerMessage.FromString(raw) == ServerMessage(replies=[CallReply(call=call, response=[piece])])


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a machine that does other things too
@given(st.lists(st.tuples(st.integers(0, 2**40), st.text(max_size=20_000)), max_size=4))
def test_replies_one_after_the_other_are_one_message(replies: list[tuple[int, str]]) -> None:
    made = [CallReply(call=call, response=[SingleGenerationReply(response=text)]) for call, text in replies]
    assert ServerMessage.FromString(b"".join(map(reply_bytes, made))) == ServerMessage(replies=made)
