"""The gateway over a real socket: MII's own route, and callers who do what they should not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mii.entrypoints.http import server
from mii.grpc_related.restful_gateway import create_app
from tests.serving.deployments import wait_until
from tests.serving.fake_backend import HttpFixture, answer_of, serving

ROUTE = "/mii/a%20b/c"


@pytest.fixture(scope="module")
def gateway() -> Iterator[HttpFixture]:
    with serving(create_app, body_bytes=100_000) as fixture:
        yield fixture


def post(gateway: HttpFixture, **body: Any) -> httpx.Response:
    return gateway.http.post(ROUTE, json=body)


def raw(gateway: HttpFixture, data: bytes, seconds: float = 5.0) -> bytes:
    """What a server says to some bytes, until it closes the connection or says nothing for a while."""
    address = httpx.URL(gateway.url)
    received = b""
    with socket.create_connection((address.host, address.port or 0), timeout=seconds) as connection:
        connection.sendall(data)
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
    return received


# MII's route


def test_answers_are_a_list_of_responses(gateway: HttpFixture) -> None:
    response = post(gateway, prompts=["DeepSpeed is", "x"], max_length=128, max_new_tokens=2)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert response.json() == [
        {"generated_text": answer_of(2), "prompt_length": length, "generated_length": 2, "finish_reason": "length"}
        for length in (2, 1)
    ]
    assert gateway.fake.calls[-1][:2] == (["DeepSpeed is", "x"], {"max_length": 128, "max_new_tokens": 2})


@pytest.mark.parametrize(
    ("prompts", "sent"), [("x", ["x"]), ([1, 2], [[1, 2]]), ([[1], "x"], ["x", [1]]), (["x", "y"], ["x", "y"])]
)
def test_prompts_may_be_one_or_several_and_token_ids(gateway: HttpFixture, prompts: Any, sent: Any) -> None:
    assert post(gateway, prompts=prompts).status_code == 200
    assert gateway.fake.calls[-1][0] == sent


def test_no_prompts_have_no_answers(gateway: HttpFixture) -> None:
    assert post(gateway, prompts=[]).json() == []
    assert post(gateway, prompts=[], stream=True).text == "data: [DONE]\n\n"


def test_every_option_goes_on_as_it_is(gateway: HttpFixture) -> None:
    options = {"stop": ["a", "b"], "top_k": None, "temperature": 0.3, "logit_bias": {"5": 1.5}, "do_sample": False}
    assert post(gateway, prompts="x", **options).status_code == 200
    assert gateway.options == options


def test_a_stream_has_lists_of_responses_and_an_end(gateway: HttpFixture) -> None:
    response = post(gateway, prompts=["x", "y z"], max_new_tokens=3, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    pieces = [piece for event in events for piece in json.loads(event.removeprefix("data: "))]
    for index, length in ((0, 1), (1, 2)):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["generated_text"] for piece in mine) == answer_of(3)
        assert {piece["prompt_length"] for piece in mine} == {length}
        assert [piece["generated_length"] for piece in mine] == [1, 2, 3, 3]
        assert [piece["finish_reason"] for piece in mine] == ["none"] * 3 + ["length"]


def test_logprobs_are_given_where_asked_for(gateway: HttpFixture) -> None:
    (answer,) = post(gateway, prompts="x y", max_new_tokens=1, logprobs=1, prompt_logprobs=0).json()
    top = [{"token_id": 0, "token": "t0", "bytes": [116, 48], "logprob": -1.0, "top": []}]
    assert answer["logprobs"] == [
        {"token_id": 7, "token": "one", "bytes": [111, 110, 101], "logprob": -0.5, "top": top}
    ]
    assert [entry["logprob"] for entry in answer["prompt_logprobs"]] == [None, -0.5]


def test_other_deployments_are_not_here(gateway: HttpFixture) -> None:
    response = gateway.http.post("/mii/other", json={"prompts": "x"})
    assert response.status_code == 404
    assert response.json()["message"] == "there is no deployment 'other' here; there is 'a b/c'"
    assert gateway.http.get(ROUTE).status_code == 405


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompts is required"),
        ({"prompts": 5}, "prompts: must be a string, a list of strings"),
        ({"prompts": ["a", 5]}, "prompts: must be a string, a list of strings"),
        ({"prompts": "a", "max_new_token": 5}, "unknown option 'max_new_token'; did you mean 'max_new_tokens'?"),
        ({"prompts": "a", "top_p": 2}, "top_p=2"),
        ({"prompts": "a", "stream": "yes"}, "stream='yes' must be a valid boolean"),
        ({"prompts": "a", "seed": 2**70}, "seed: 1180591620717411303424 of type int cannot be sent"),
        ({"prompts": [[2**40]]}, "a prompt cannot be sent"),
        ({"prompts": "!long"}, "the prompt has 9 tokens and 8 are allowed"),
        ([], "the body must be a JSON object"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(gateway: HttpFixture, body: Any, words: str) -> None:
    response = gateway.http.post(ROUTE, json=body)
    assert response.status_code == 400
    assert words in response.json()["message"]


@pytest.mark.parametrize(("prompt", "status"), [("!busy", 429), ("!gone", 503), ("!wrong", 500), ("!breaks", 500)])
def test_failures_have_their_status_and_say_when_to_come_back(gateway: HttpFixture, prompt: str, status: int) -> None:
    response = post(gateway, prompts=prompt)
    assert response.status_code == status and response.json()["message"]
    expected = {429: "3", 503: "1"}.get(status)
    assert response.headers.get("retry-after") == expected


def test_one_of_several_streamed_answers_may_fail_alone(gateway: HttpFixture) -> None:
    text = post(gateway, prompts=["!breaks", "x"], max_new_tokens=4, stream=True).text
    assert '"error":"the engine could not go on"' in text and '"finish_reason":"length"' in text


# Bodies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompts": "x"} more', "not valid JSON"),
        (b'{"prompts": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
        (b'{"prompts": "\\ud800"}', "a text with '\\ud800', half of a surrogate pair; send whole characters"),
        (b'{"prompts": "x", "top_p": NaN}', "not valid JSON"),
        (b'{"prompts": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "must be a string, a list of strings"),
        (b'{"prompts": "x", "stop": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(gateway: HttpFixture, body: bytes, words: str) -> None:
    response = gateway.http.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["message"] or "nested too deeply" in response.json()["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_kinds_of_bodies_are_refused(gateway: HttpFixture, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = gateway.http.post(ROUTE, content=b'{"prompts": "x"}', headers=headers)
    assert response.status_code == 415 and "send 'Content-Type: application/json'" in response.json()["message"]


def test_json_may_say_its_charset(gateway: HttpFixture) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert gateway.http.post(ROUTE, content=b'{"prompts": "x"}', headers=headers).status_code == 200


def test_long_bodies_are_refused_whether_or_not_they_say_how_long_they_are(gateway: HttpFixture) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"prompts": "'
        for _ in range(200):
            yield b"x" * 1000

    for body in (b'{"prompts": "' + b"x" * 200_000 + b'"}', parts()):
        with httpx.Client(base_url=gateway.url) as client:
            try:
                response = client.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
            except httpx.WriteError:  # it was closed while we were still writing
                continue
            assert response.status_code == 413 and "more than 100000 bytes" in response.json()["message"]
    head = (
        b"POST /mii/a%20b/c HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999999999\r\n\r\n"
    )
    assert raw(gateway, head).startswith(b"HTTP/1.1 413 ")


# Clients who go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_call(gateway: HttpFixture, stream: bool) -> None:
    calls, before = len(gateway.fake.calls), gateway.fake.cancelled
    body = json.dumps({"prompts": "!slow", "stream": stream}).encode()
    head = b"POST /mii/a%%20b/c HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    address = httpx.URL(gateway.url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.sendall(head % len(body) + body)
        wait_until(lambda: len(gateway.fake.calls) > calls)
        assert gateway.fake.cancelled == before
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
    gateway.wait_cancelled(before + 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel does this on Linux only")
def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 1)
    with serving(create_app) as gateway, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        address = httpx.URL(gateway.url)
        connection.connect((address.host, address.port))
        body = json.dumps({"prompts": ["x"] * 100, "stream": True, "max_new_tokens": 80, "logprobs": 50}).encode()
        head = b"POST /mii/a%%20b/c HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        wait_until(lambda: 'mii_http_requests_total{route="/mii",status="499"} 1.0' in metrics(gateway))
        assert 'mii_http_requests_running{route="/mii"} 0.0' in metrics(gateway)


def metrics(gateway: HttpFixture) -> str:
    return gateway.http.get("/metrics").text


def test_a_client_that_hangs_up_while_it_sends_is_forgotten(gateway: HttpFixture) -> None:
    calls = len(gateway.fake.calls)
    address = httpx.URL(gateway.url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        head = b"POST /mii/a%20b/c HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head + b'{"prompts"')
        time.sleep(0.1)
    assert post(gateway, prompts="x").status_code == 200
    assert len(gateway.fake.calls) == calls + 1


@pytest.mark.parametrize("data", [b"\x00\xff\x16\x03\x01", b"GET / HTTP/9.9\r\n\r\n", b"x" * 100_000 + b"\r\n\r\n"])
def test_bytes_that_are_no_http_get_400(gateway: HttpFixture, data: bytes) -> None:
    answer = raw(gateway, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert gateway.http.get("/healthz").status_code == 200
