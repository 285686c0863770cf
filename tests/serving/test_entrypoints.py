"""The HTTP servers that are started by hand: their options, and the processes themselves over real deployments."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from mii.entrypoints.options import cors_options, model_options, parser, read_chat_template
from tests.serving.deployments import processes_of, wait_until
from tests.serving.fake_backend import serving

OPENAI, PLAIN = "mii.entrypoints.openai_api_server", "mii.entrypoints.api_server"


def parse(*words: str, openai: bool = True, **environment: str) -> argparse.Namespace:
    return parser("server", "", environment, openai=openai).parse_args(words)


@contextmanager
def running(module: str, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the URL that it answers at."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if match := re.match(r"HTTP on (\S+:\d+)", line):
                yield process, f"http://{match[1]}"
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


# Options


@pytest.mark.parametrize("spelling", ["--max-length", "--max_length"])
def test_both_spellings_of_max_length_are_one_option(spelling: str) -> None:
    assert model_options(parse(spelling, "99"))["max_length"] == 99
    assert "max_length" not in model_options(parse())


def test_the_defaults_are_those_of_deepspeed_mii_but_closed() -> None:
    args = parse()
    assert (args.model, args.deployment_name) == ("mistralai/Mistral-7B-Instruct-v0.1", "deepspeed-mii")
    assert (args.host, args.port, args.load_balancer) == ("127.0.0.1", 8000, None)
    assert (args.response_role, args.chat_template, args.api_keys, args.ssl) == ("assistant", None, None, False)
    assert model_options(args) == {"deployment_name": "deepspeed-mii", "tensor_parallel": 1, "replica_num": 1}
    assert cors_options(args) is None


def test_the_environment_gives_defaults_and_options_count_before_it() -> None:
    environment = {"MODEL_ID": "m", "DEPLOYMENT_NAME": "d", "RESPONSE_ROLE": "r"}
    args = parse(**environment)
    assert (args.model, args.deployment_name, args.response_role) == ("m", "d", "r")
    assert parse("--model", "other", **environment).model == "other"


def test_pages_of_other_origins_are_allowed_by_any_of_their_options() -> None:
    assert cors_options(parse("--allowed-origins", '["https://a"]')) == {"origins": ("https://a",)}
    assert cors_options(parse("--allow-credentials")) == {"credentials": True}
    args = parse("--allowed-methods", '["POST"]', "--allowed-headers", '["*"]')
    assert cors_options(args) == {"methods": ("POST",), "headers": ("*",)}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--load-balancer", "localhost"], "'localhost' is not of the form HOST:PORT"),
        (["--load-balancer", "localhost:99999"], "is not of the form HOST:PORT"),
        (["--allowed-origins", "*"], "is no JSON list of strings"),
        (["--api-keys", "a", "--api-key-file", "b"], "not allowed with"),
        (["--option", "device"], "not of the form NAME=VALUE"),
    ],
)
def test_wrong_options_are_refused(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert reason in capsys.readouterr().err


def test_the_plain_server_has_no_options_of_openais() -> None:
    assert not {"chat_template", "response_role", "api_keys", "ssl"} & set(vars(parse(openai=False)))


def test_a_chat_template_is_a_file_or_itself(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}\n")
    assert read_chat_template(str(file)) == "{{ messages }}\n"
    assert read_chat_template(r"{{ messages }}\n\tü") == "{{ messages }}\n\tü"
    assert read_chat_template(None) is None
    with pytest.raises(ValueError, match=r"there is no file missing\.jinja, and it is no Jinja template"):
        read_chat_template("missing.jinja")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--chat-template", "missing.jinja"], "there is no file missing.jinja"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--ssl"], "TLS needs SSL_CERTFILE and SSL_KEYFILE in the environment"),
        (["--host", "no.such.host.invalid"], "port 0 of 'no.such.host.invalid' cannot be listened on"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(words: list[str], reason: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", OPENAI, "--port", "0", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert reason in ended.stderr.splitlines()[-1]


# Processes


def test_the_openai_server_uses_a_deployment_that_is_there() -> None:
    from mii.grpc_related.restful_gateway import create_app

    with serving(create_app) as deployment:
        balancer = deployment.fake.address
        with running(OPENAI, "--load-balancer", balancer, "--model", "m", API_KEYS="secret") as (process, url):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
            answer = client.completions.create(model="m", prompt="x", max_tokens=1)
            assert answer.choices[0].text == "one"
            assert httpx.get(f"{url}/v1/models").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_the_plain_server_starts_a_deployment_which_ends_with_it(tiny_llama: Path, cache: Path) -> None:
    words = ["--model", str(tiny_llama), "--option", "device=cpu", "--deployment-name", "a b/c", "--max_length", "64"]
    with running(PLAIN, *words) as (process, url):
        body = {"prompt": ["DeepSpeed is", "x"], "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/generate", json=body, timeout=60)
        assert answer.status_code == 200 and len(answer.json()["text"]) == 2
        too_long = httpx.post(f"{url}/generate", json={"prompt": "x" * 64}, timeout=60)
        assert too_long.status_code == 400 and "(max_length)" in too_long.json()["message"]
        assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    wait_until(lambda: not processes_of(cache))


def test_a_server_that_is_killed_leaves_no_deployment(tiny_llama: Path, cache: Path) -> None:
    words = ["--model", str(tiny_llama), "--option", "device=cpu"]
    with running(OPENAI, *words) as (process, url):
        chat = {"model": str(tiny_llama), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).json()
        assert answer["usage"]["prompt_tokens"] == len("<s>user\nHi</s><s>assistant\n") - len("<s></s><s>") + 3
        process.kill()
    wait_until(lambda: not processes_of(cache))
    wait_until(lambda: not any(path for path in cache.rglob("*") if not path.is_dir()))


def test_a_model_that_is_not_there_is_an_error_in_one_line(cache: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", OPENAI, "--port", "0", "--model", "./missing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    expected = f"python -m {OPENAI}: error: there is no folder or file ./missing"
    assert ended.stderr.splitlines()[-1].startswith(expected)
