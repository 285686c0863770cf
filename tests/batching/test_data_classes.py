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
    StreamedResponse,
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


@pytest.mark.parametrize(
    "message",
    [
        EngineRequest(7, [1, 2], 3, 1, (2, 9), SamplingParams(0.5, 4, 0.9, 0.1, 2**63 - 1)),
        TokenOutput(7, [3], "stop"),
        TokenOutput(7, [], "error", "no room"),
    ],
)
def test_engine_messages_survive_msgpack(message: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_the_pipelines_and_their_messages_load_without_torch() -> None:
    code = (
        "import sys, mii.batching.data_classes, mii.batching.pipeline, mii.batching.async_pipeline; "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'grpc') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
