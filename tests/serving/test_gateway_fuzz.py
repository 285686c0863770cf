"""Requests that nobody would write by hand, made from the gateway's own description of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from mii.entrypoints import api_server
from mii.grpc_related.restful_gateway import create_app
from tests.serving.fake_backend import HttpFixture, serving

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.checks")

# As many examples as fit into some seconds, and the same ones every time.
BOUNDED = settings(max_examples=25, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def gateway() -> Iterator[HttpFixture]:
    with serving(create_app, deployment="demo", body_bytes=1 << 20) as fixture:
        yield fixture


@pytest.fixture(scope="module")
def plain() -> Iterator[HttpFixture]:
    with serving(api_server.create_app, body_bytes=1 << 20) as fixture:
        yield fixture


def fuzz(server: HttpFixture) -> None:
    """Every operation answers, whatever it is asked: 5xx is our mistake, and what is refused gets a sentence."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert operations
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @BOUNDED
            def run(case: Any) -> None:
                check(case)

            with contextlib.suppress(Unsatisfiable):  # where nothing can be wrong
                run()


def aim(case: Any) -> None:
    """Names what is there, so that requests get further than to the question whether it is."""
    if case.path.startswith("/mii/"):
        case.path_parameters["name"] = "demo"
    elif isinstance(case.body, dict) and case.path.startswith("/v1/"):
        case.body["model"] = "tiny"


def check(case: Any) -> None:
    aim(case)
    response = case.call()
    case.validate_response(response, checks=[checks.not_a_server_error])
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


def test_the_gateway_answers_whatever_it_is_asked(gateway: HttpFixture) -> None:
    fuzz(gateway)
    assert any(options for _, options, _ in gateway.fake.calls), "no request was right"


def test_the_plain_server_answers_whatever_it_is_asked(plain: HttpFixture) -> None:
    fuzz(plain)
    assert plain.fake.calls, "no request was right"
