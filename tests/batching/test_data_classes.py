"""Responses are plain data that prints as its text; engine messages survive their serialiser."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest

from mii.batching.data_classes import (
    EngineRequest,
    GenerationFinishReason,
    Response,
    SamplingParams,
    StepOutput,
    StreamedResponse,
    TokenLogprob,
    TokenOutput,
)


def test_a_list_of_responses_prints_as_its_texts() -> None:
    responses = [Response("one", 1, 2, GenerationFinishReason.STOP), Response("two", 1, 2, GenerationFinishReason.NONE)]
    assert (str(responses[0]), repr(responses)) == ("one", "[one, two]")
    assert repr(StreamedResponse("piece", 1, 2, GenerationFinishReason.NONE, 7)) == "piece"


def test_a_response_equals_one_whose_reason_is_a_plain_string() -> None:
    assert Response("a", 1, 2, GenerationFinishReason.STOP) == Response("a", 1, 2, "stop")  # type: ignore[arg-type]
    assert Response("a", 1, 2, GenerationFinishReason.STOP) != Response("a", 1, 3, GenerationFinishReason.STOP)


def test_a_response_is_mutable_and_unhashable() -> None:
    response = Response("a", 1, 2, GenerationFinishReason.STOP)
    response.generated_text = "b"
    assert str(response) == "b"
    with pytest.raises(TypeError, match="unhashable"):
        hash(response)


def test_a_response_survives_json() -> None:
    response = Response("é", 1, 2, GenerationFinishReason.LENGTH)
    message = json.loads(json.dumps(response.to_msg_dict()))
    assert message == {"generated_text": "é", "prompt_length": 1, "generated_length": 2, "finish_reason": "length"}
    back = Response.from_msg_dict(message)
    assert back == response
    assert back.finish_reason is GenerationFinishReason.LENGTH


def test_log_probabilities_are_no_part_of_a_response_s_text_or_equality() -> None:
    entry = TokenLogprob(5, -0.5, (TokenLogprob(5, -0.5), TokenLogprob(6, float("-inf"), token=b"\xc3")), b"\xc3")
    response = Response("a", 1, 1, GenerationFinishReason.STOP, logprobs=[entry], prompt_logprobs=[])
    assert repr(response) == str(response) == "a"
    assert response == Response("a", 1, 1, GenerationFinishReason.STOP)
    message = json.loads(json.dumps(response.to_msg_dict(), allow_nan=False))
    assert message["logprobs"][0]["top"][1] == {
        "token_id": 6,
        "token": "\ufffd",
        "bytes": [0xC3],
        "logprob": -9999.0,
        "top": [],
    }
    back = Response.from_msg_dict(message)
    assert back.logprobs is not None
    assert (back.logprobs[0].token, back.logprobs[0].top[0]) == (b"\xc3", entry.top[0])
    assert back.prompt_logprobs == []


@pytest.mark.parametrize(
    "message",
    [
        EngineRequest(7, [1, 2], 3, 1, (2, 9), SamplingParams(0.5, 4, 0.9, 0.1, 2**63 - 1)),
        EngineRequest(7, [1], 3, sampling=SamplingParams(logit_bias={5: -1.5}, allowed_ids=(5, 6)), logprobs=0),
        TokenOutput(7, [3], "stop"),
        TokenOutput(7, [3], logprobs=[TokenLogprob(3, -1.5, (TokenLogprob(4, -0.5),))], prompt_logprobs=[]),
        TokenOutput(7, [], "error", "no room"),
        StepOutput([7, 9], [3, 4], [TokenOutput(8, [3], "stop")]),
        StepOutput(),
    ],
)
def test_engine_messages_survive_msgpack(message: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_a_step_has_in_columns_what_is_a_token_alone_and_loses_nothing() -> None:
    plain = [TokenOutput(7, [3]), TokenOutput(9, [0])]
    others = [
        TokenOutput(1, [3], "stop"),
        TokenOutput(2, []),
        TokenOutput(3, [4, 5]),
        TokenOutput(4, [4], logprobs=[TokenLogprob(4, -1.0)]),
        TokenOutput(5, [], "error", "no room"),
    ]
    step = StepOutput.of([others[0], *plain, *others[1:]])
    assert (step.uids, step.token_ids, step.others) == ([7, 9], [3, 0], others)
    assert list(step) == plain + others
    assert len(step) == 7
    assert not StepOutput()


def test_what_is_not_asked_for_takes_no_room_in_a_message() -> None:
    assert len(msgspec.msgpack.encode(TokenOutput(7, [3]))) == len(msgspec.msgpack.encode({"uid": 7, "token_ids": [3]}))
    assert b"sampling" not in msgspec.msgpack.encode(EngineRequest(7, [1], 3))


def test_the_pipelines_and_their_messages_load_without_torch() -> None:
    code = (
        "import sys, mii.batching.data_classes, mii.batching.pipeline, mii.batching.async_pipeline; "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'grpc') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
