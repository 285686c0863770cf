"""The protocol: numbers that never change, stubs that are up to date, values that arrive as they were sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as some

from mii.batching.data_classes import GenerationFinishReason, StreamedResponse, TokenLogprob
from mii.errors import PromptEncodingError, RequestError
from mii.grpc_related import convert
from mii.grpc_related.convert import (
    pack_logprobs,
    pack_request,
    pack_value,
    positions_of,
    prompts_of,
    read_logprobs,
    read_reply,
    unpack_options,
    unpack_value,
)
from mii.grpc_related.proto import modelresponse_pb2 as proto

ROOT = Path(__file__).parents[2]
# DeepSpeed-MII's messages: its clients and ours understand each other.
ORIGINAL = {
    "Value": {"svalue": 1, "ivalue": 2, "fvalue": 3, "bvalue": 4, "mvalue": 5},
    "Dictionary": {"values": 1},
    "SingleStringRequest": {"request": 1, "query_kwargs": 2},
    "MultiStringRequest": {"request": 1, "query_kwargs": 2},
    "SingleGenerationReply": {
        "response": 1,
        "finish_reason": 2,
        "prompt_tokens": 3,
        "generated_tokens": 4,
        "time_taken": 5,
        "model_time_taken": 6,
    },
    "MultiGenerationReply": {"response": 1},
}


def test_the_numbers_of_the_original_protocol_stay() -> None:
    for message, fields in ORIGINAL.items():
        ours = {field.name: field.number for field in proto.DESCRIPTOR.message_types_by_name[message].fields}
        assert fields.items() <= ours.items(), message
    service = proto.DESCRIPTOR.services_by_name["ModelResponse"]
    assert service.full_name == "modelresponse.ModelResponse"
    methods = {method.name: (method.input_type.name, method.output_type.name) for method in service.methods}
    assert (
        methods["GeneratorReply"] == methods["GeneratorReplyStream"] == ("MultiStringRequest", "MultiGenerationReply")
    )
    assert methods["Terminate"] == ("Empty", "Empty")


def test_the_generated_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    well_known = Path(protoc.__file__).parent / "_proto"
    output = tmp_path / "set"
    arguments = ["", f"-I{ROOT / 'proto'}", f"-I{well_known}", f"--descriptor_set_out={output}", "modelresponse.proto"]
    assert protoc.main(arguments) == 0
    (expected,) = FileDescriptorSet.FromString(output.read_bytes()).file
    committed = FileDescriptorProto()
    proto.DESCRIPTOR.CopyToProto(committed)
    for each in (expected, committed):
        _without_json_names(each.message_type)
    assert committed == expected, "run proto/generate.py"


def _without_json_names(messages: Any) -> None:
    """Only one of protoc's outputs has them."""
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        _without_json_names(message.nested_type)


plain = some.none() | some.booleans() | some.integers(-(2**63), 2**63 - 1) | some.text() | some.floats(allow_nan=False)
values = some.recursive(plain, lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner), max_leaves=20)


@given(values)
def test_what_is_sent_arrives(value: Any) -> None:
    arrived = unpack_value(proto.Value.FromString(pack_value(value).SerializeToString()))
    assert arrived == value and type(arrived) is type(value)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (numpy.float32(0.5), 0.5),
        (numpy.float64(0.9), 0.9),
        (numpy.int16(-3), -3),
        (numpy.bool_(True), True),
        (numpy.array([1, 2]), [1, 2]),
        (numpy.array(["a", "b"]), ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        ({"a": (1, None)}, {"a": [1, None]}),
        ({50256: -100}, {"50256": -100}),
        (GenerationFinishReason.STOP, "stop"),
        (1e300, 1e300),
        (-math.inf, -math.inf),
    ],
)
def test_other_libraries_values_arrive_as_pythons_own(value: Any, arrives: Any) -> None:
    arrived = unpack_value(pack_value(value))
    assert arrived == arrives and type(arrived) is type(arrives)


def test_a_number_that_is_none_arrives() -> None:
    assert math.isnan(unpack_value(pack_value(math.nan)))


@pytest.mark.parametrize("number", [0.9, 0.1, 1e-5, 3.4e38, 0.95, 1.0, 16777216.0, 1.1754944e-38])
def test_an_old_clients_floats_arrive_as_they_were_written(number: float) -> None:
    assert unpack_value(proto.Value(fvalue=number)) == number


def test_an_old_server_finds_floats_where_it_looks() -> None:
    sent = pack_value(0.9)
    assert sent.WhichOneof("oneof_values") == "fvalue" and sent.fvalue == pytest.approx(0.9)


def test_a_call_that_is_longer_than_a_message_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "GRPC_MAX_MESSAGE_BYTES", 1000)
    assert prompts_of(pack_request(["x" * 500], {}))
    with pytest.raises(RequestError, match=r"the prompts have 1\d\d\d bytes, and a call may have 1000; send fewer"):
        pack_request(["x" * 500] * 2, {})


@pytest.mark.parametrize("value", [b"bytes", bytearray(b"x"), object(), 2**63, -(2**63) - 1, 1j, [object()]])
def test_what_cannot_travel_is_named(value: Any) -> None:
    with pytest.raises(RequestError, match="cannot be sent; send text, numbers of up to 64 bits"):
        pack_value(value)


def test_texts_and_tokens_keep_their_places() -> None:
    request = pack_request(["a", [1, 2], "b", numpy.array([3]), "c"], {})
    assert dict(zip(positions_of(request), prompts_of(request), strict=True)) == {
        0: "a",
        1: [1, 2],
        2: "b",
        3: [3],
        4: "c",
    }
    assert positions_of(pack_request(["a", [1]], {})) == [0, 1]
    assert not pack_request(["a", [1]], {}).positions


@pytest.mark.parametrize("positions", [[0], [0, 0], [0, -1], [0, 1, 2]])
def test_places_that_do_not_fit_the_prompts_are_refused(positions: list[int]) -> None:
    with pytest.raises(RequestError, match="a call has 2 prompts and the positions"):
        positions_of(proto.MultiStringRequest(request=["a", "b"], positions=positions))


@pytest.mark.parametrize("prompts", [["ok", "\ud83d"], ["\udc00"]])
def test_half_a_surrogate_pair_is_refused_before_it_is_sent(prompts: list[str]) -> None:
    with pytest.raises(PromptEncodingError, match="is half of a surrogate pair"):
        pack_request(prompts, {})


def test_half_a_surrogate_pair_in_an_option_is_refused() -> None:
    with pytest.raises(PromptEncodingError, match="is half of a surrogate pair"):
        pack_request(["ok"], {"stop": ["\ud83d"]})


@pytest.mark.parametrize("ids", [[2**31], [-(2**40)], [0.5], ["a"]])
def test_tokens_that_are_none_are_refused_before_they_are_sent(ids: list[Any]) -> None:
    with pytest.raises(RequestError, match="a prompt cannot be sent; give text, or token ids"):
        pack_request([ids], {})


def test_options_arrive_together() -> None:
    options = {"stop": ["\n", "###"], "top_k": None, "top_p": 0.9, "max_new_tokens": 5, "do_sample": False}
    assert unpack_options(pack_request(["x"], options)) == options


def test_a_reply_is_a_response() -> None:
    reply = proto.SingleGenerationReply(
        response="text", finish_reason="length", prompt_tokens=3, generated_tokens=4, index=7
    )
    read = read_reply(reply)
    assert read == StreamedResponse("text", 3, 4, GenerationFinishReason.LENGTH, index=7)
    assert read.logprobs is None and read.prompt_logprobs is None


@pytest.mark.parametrize("reason", ["", "none", "error"])
def test_a_reply_without_a_reason_runs_on(reason: str) -> None:
    assert read_reply(proto.SingleGenerationReply(finish_reason=reason)).finish_reason is GenerationFinishReason.NONE


def test_log_probabilities_arrive() -> None:
    top = (TokenLogprob(1, -0.25, (), b"a"), TokenLogprob(2, -math.inf, (), b"\xff"))
    entries = [TokenLogprob(5, None, (), b""), TokenLogprob(1, -0.25, top, b"a")]
    assert read_logprobs(pack_logprobs(entries)) == entries
    reply = proto.SingleGenerationReply(logprobs=pack_logprobs(entries))
    assert read_reply(proto.SingleGenerationReply.FromString(reply.SerializeToString())).logprobs == entries
