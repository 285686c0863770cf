"""The gateway over a real socket: MII's own route, health, termination, and callers who do what they should not."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mii.entrypoints import api_server
from mii.entrypoints.http import server
from mii.entrypoints.http.server import TlsFiles, listen, tls_from_environment
from mii.entrypoints.http.settings import ApiKeys, CorsSettings, read_api_keys
from mii.errors import PortTakenError
from mii.grpc_related.options import REQUEST_ID
from mii.grpc_related.restful_gateway import create_app
from tests.serving.deployments import wait_until
from tests.serving.fake_backend import TOKEN_OF_DEPLOYMENT, HttpFixture, answer_of, serving

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
        ({"prompts": "a", "seed": 2**70}, "an option is 1180591620717411303424 of type int, which cannot be sent"),
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
        (b'{"prompts": "\xff"}', "not UTF-8: invalid start byte at byte"),
        (b'{"prompts": "\\ud800"}', "not valid JSON"),
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
    before = gateway.fake.cancelled
    body = json.dumps({"prompts": "!slow", "stream": stream}).encode()
    head = b"POST /mii/a%%20b/c HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    address = httpx.URL(gateway.url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.sendall(head % len(body) + body)
        time.sleep(0.2)
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


# Health and the end


def test_health_asks_the_deployment(gateway: HttpFixture) -> None:
    assert gateway.http.get("/healthz").text == "ok"
    assert gateway.http.get("/health").json()["status"] == "ok"
    gateway.fake.ready = False
    try:
        for path in ("/health", "/healthz"):
            response = gateway.http.get(path)
            assert response.status_code == 503
            assert response.json()["message"] == "not ready: replica 0: no engine"
    finally:
        gateway.fake.ready = True


def test_only_the_token_ends_the_deployment(gateway: HttpFixture) -> None:
    assert gateway.http.get("/terminate").status_code == 405
    assert gateway.http.post("/terminate").status_code == 401
    for wrong in ("x", "sécret", "a" * 5000):
        response = gateway.http.post("/terminate", headers={"Authorization": f"Bearer {wrong}".encode("latin-1")})
        assert response.status_code == 403
        assert "the token is not this deployment's" in response.json()["message"]
    assert gateway.fake.terminated == 0
    headers = {"Authorization": f"Bearer {TOKEN_OF_DEPLOYMENT}"}
    assert gateway.http.post("/terminate", headers=headers).status_code == 200
    assert gateway.fake.terminated == 1


def test_requests_have_a_name_in_every_log(gateway: HttpFixture) -> None:
    response = gateway.http.post(ROUTE, json={"prompts": "x"}, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert gateway.fake.calls[-1][2][REQUEST_ID] == "mine-1"
    response = gateway.http.post(ROUTE, json={"prompts": "x"}, headers={"X-Request-Id": "no name\té".encode()})
    assert response.headers["x-request-id"] == gateway.fake.calls[-1][2][REQUEST_ID] != ""
    assert gateway.http.get("/nothing").headers["x-request-id"]


def test_the_gateway_has_the_openai_routes(gateway: HttpFixture) -> None:
    response = gateway.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
    assert response.json()["choices"][0]["text"] == "one"


def test_nothing_is_at_other_paths(gateway: HttpFixture) -> None:
    response = gateway.http.get("/nothing")
    assert (response.status_code, response.json()["message"]) == (404, "there is nothing at /nothing; look at /docs")


def test_keys_guard_every_route_that_generates() -> None:
    with serving(create_app, api_keys=ApiKeys(["k"])) as gateway:
        assert gateway.http.post(ROUTE, json={"prompts": "x"}).status_code == 401
        headers = {"Authorization": "Bearer k"}
        assert gateway.http.post(ROUTE, json={"prompts": "x"}, headers=headers).status_code == 200


def test_a_request_may_take_so_long_and_no_longer() -> None:
    with serving(create_app, timeout=0.3) as gateway:
        response = post(gateway, prompts="!slow")
        assert response.status_code == 504
        gateway.wait_cancelled()


def test_a_deployment_that_is_gone_is_503() -> None:
    with serving(create_app, balancer="127.0.0.1:1") as gateway:
        assert gateway.http.get("/health").status_code == 503
        response = post(gateway, prompts="x")
        assert response.status_code == 503
        assert "the load balancer at 127.0.0.1:1 does not answer" in response.json()["message"]


def test_pages_of_other_origins_are_let_in_only_where_asked_for(gateway: HttpFixture) -> None:
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    refused = gateway.http.options(ROUTE, headers=ask)
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers
    with serving(create_app, cors=CorsSettings(origins=("https://example.org",))) as open_gateway:
        allowed = open_gateway.http.options(ROUTE, headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        other = open_gateway.http.options(ROUTE, headers={**ask, "Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


# The plain server


def test_the_plain_server_gives_texts() -> None:
    with serving(api_server.create_app) as plain:
        body = {"prompt": ["a", "b"], "max_tokens": 2}
        assert plain.http.post("/generate", json=body).json() == {"text": [answer_of(2)] * 2}
        stream = plain.http.post("/generate", json={"prompt": "a", "max_tokens": 2, "stream": True}).text
        assert stream == 'data: {"text":["one"]}\n\ndata: {"text":[" two"]}\n\ndata: [DONE]\n\n'
        several = plain.http.post("/generate", json={**body, "max_tokens": 1, "stream": True}).text
        assert '{"text":["one"],"index":1}' in several
        assert plain.http.post("/generate", json={"prompt": 5}).status_code == 422
        assert plain.http.post("/generate", content=b"{", headers={"Content-Type": "application/json"}).status_code
        assert plain.http.get("/health").json()["status"] == "ok"


# Sockets and keys


def test_a_port_that_is_taken_is_an_error() -> None:
    (first,) = listen("127.0.0.1", 0)
    with first, pytest.raises(PortTakenError, match=r"port \d+ of '127.0.0.1' cannot be listened on: Address already"):
        listen("127.0.0.1", first.getsockname()[1])
    with pytest.raises(PortTakenError, match=r"port 1 of 'no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 1)


def test_localhost_is_every_address_of_its_name() -> None:
    sockets = listen("localhost", 0)
    assert len({listener.getsockname()[1] for listener in sockets}) == 1
    assert "127.0.0.1" in {listener.getsockname()[0] for listener in sockets}
    for listener in sockets:
        listener.close()


def test_keys_come_from_an_option_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("API_KEYS", raising=False)
    assert not read_api_keys()
    monkeypatch.setenv("API_KEYS", "a, b")
    assert read_api_keys() and read_api_keys("c")
    file = tmp_path / "keys"
    file.write_text("k\n\n")
    assert read_api_keys(None, str(file))
    with pytest.raises(ValueError, match="there is no key"):
        read_api_keys(" , ")


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"openssl makes no certificate here: {made.stderr.decode()[-200:]}")
    files = tls_from_environment({"SSL_CERTFILE": certificate, "SSL_KEYFILE": key})
    assert files == TlsFiles(certificate, key)
    with serving(create_app, tls=files) as gateway:
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{gateway.url}/healthz", verify=context).text == "ok"
    with pytest.raises(ValueError, match="TLS needs SSL_KEYFILE in the environment"):
        tls_from_environment({"SSL_CERTFILE": certificate})
    with pytest.raises(ValueError, match="are no certificate and key"):
        tls_from_environment({"SSL_CERTFILE": key, "SSL_KEYFILE": certificate})


def test_the_gateway_needs_no_torch() -> None:
    code = (
        "import sys, mii.grpc_related.restful_gateway\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
