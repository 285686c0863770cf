"""The gateway over a real socket: health, its end, and who may ask."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mii.entrypoints import api_server
from mii.entrypoints.http.server import TlsFiles, listen, tls_from_environment
from mii.entrypoints.http.settings import ApiKeys, CorsSettings, read_api_keys
from mii.errors import PortTakenError
from mii.grpc_related.options import REQUEST_ID
from mii.grpc_related.restful_gateway import create_app
from tests.serving.fake_backend import TOKEN_OF_DEPLOYMENT, HttpFixture, answer_of, serving

ROUTE = "/mii/a%20b/c"


@pytest.fixture(scope="module")
def gateway() -> Iterator[HttpFixture]:
    with serving(create_app, body_bytes=100_000) as fixture:
        yield fixture


def post(gateway: HttpFixture, **body: Any) -> httpx.Response:
    return gateway.http.post(ROUTE, json=body)


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
