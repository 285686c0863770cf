"""`mii bench serve` against a deployment whose engine is a stand-in that emits tokens at a set rate."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mii.cli import main
from tests.serving.clusters import NAME, Cluster, running_cluster
from tests.serving.crowd import http_options
from tests.serving.standin import Options

STEP_SECONDS = 0.01
SHORT = ("--mean-prompt-length", "40", "--mean-max-new-tokens", "8", "--requests", "8")


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MII_CACHE_PATH", str(tmp_path_factory.mktemp("cache")))
        options = Options(step_seconds=STEP_SECONDS, max_length=300)
        config = {"queue_size": 4, **http_options()}
        with running_cluster(patch, tiny_llama, replicas=1, options=options, **config) as running:
            yield running


def bench(*arguments: str, file: Path) -> dict[str, Any]:
    """Runs the command, which must end well, and gives its report."""
    assert main(["bench", "serve", *arguments, "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.parametrize("api", ["grpc", "mii", "completions"])
def test_every_token_is_counted_whatever_is_spoken(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], api: str
) -> None:
    report = bench("--deployment", NAME, "--api", api, "--clients", "1", "4", *SHORT, file=tmp_path / "r.json")
    assert report["benchmark"] == "serve" and {"date", "command", "machine", "versions"} <= report.keys()
    assert (report["target"]["name"], report["target"]["api"]) == (NAME, api)
    one, four = report["points"]
    assert (one["load"]["clients"], four["load"]["clients"]) == (1, 4)
    for point in (one, four):
        assert point["completed"] == point["requests"] == 8 and point["errors"]["count"] == 0
        assert point["answer_tokens"] > 30 and point["prompt_tokens"] > 160
        assert 0 < point["token_s"]["p50"] <= point["token_s"]["p99"]
        assert point["processor_s"].keys() >= {"balancer", "gateway", "replica-0-front", "replica-0-engine"}
        assert point["generator"]["processor_s"] > 0
    assert "at 4/s" in capsys.readouterr().out


def test_requests_at_random_times_and_the_picture(cluster: Cluster, tmp_path: Path) -> None:
    picture = tmp_path / "deeper" / "result.png"
    rates = ("--rate", "10", "20", "--warmup", "0", "--no-stream")
    report = bench("--deployment", NAME, *rates, *SHORT, "--plot", str(picture), file=tmp_path / "r.json")
    assert [point["load"]["rate"] for point in report["points"]] == [10, 20]
    assert report["workload"]["stream"] is False
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 500


def test_a_server_that_is_busy_is_an_error_by_its_name(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = cluster.address.rpartition(":")[2]
    report = bench("--port", port, "--clients", "12", "--warmup", "0", *SHORT[:4], file=tmp_path / "r.json")
    (point,) = report["points"]
    kinds = point["errors"]["kinds"]
    assert kinds.keys() == {"ServerBusyError"} and 0 < kinds["ServerBusyError"] < point["requests"]
    assert point["completed"] + kinds["ServerBusyError"] == point["requests"]
    assert "prompts are running or waiting" in capsys.readouterr().out


def test_prompts_can_be_windows_over_a_text(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It was a bright cold day in April, and the clocks were striking thirteen. ")
    arguments = ("--deployment", NAME, "--text", str(tmp_path / "text"), "--clients", "2", "--prompt-length-var", "0")
    report = bench(*arguments, *SHORT, file=tmp_path / "r.json")
    assert report["points"][0]["prompt_tokens"] == 8 * 40


def test_a_url_and_its_model(cluster: Cluster, tmp_path: Path) -> None:
    url = f"http://localhost:{cluster.config.restful_api_port}/v1/completions"
    report = bench("--url", url, "--vocab", "261", "--clients", "2", *SHORT, file=tmp_path / "r.json")
    assert report["points"][0]["completed"] == 8
    assert report["target"]["name"] == cluster.config.model_conf.model_name_or_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of --deployment NAME, --port N"),
        (("--port", "1", "--url", "http://localhost/v1/completions"), "one of --deployment NAME, --port N"),
        (("--url", "http://localhost/v1/models"), "neither /completions"),
        (("--url", "http://localhost/v1/completions", "--model", "m"), "give --vocab N or --text"),
        (("--url", "http://localhost/v1/chat/completions", "--model", "m", "--vocab", "100"), "--text FILE"),
    ],
)
def test_what_is_wrong_in_the_command_line_is_said(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [("--clients", "0"), ("--rate", "inf"), ("--rate", "1", "--clients", "1"), ("--param", "x"), ("--mix", "nonsense")],
)
def test_wrong_options_end_the_command_with_code_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", *arguments])
    assert end.value.code == 2


def test_nobody_there_and_requests_that_are_too_long(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--port", "1", *SHORT]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["bench", "serve", "--deployment", NAME]) == 1
    assert "the server takes 300 in all" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "serve", "--port", "1", "--plot", "x.png"]) == 1
    assert "pip install 'mii[plot]'" in capsys.readouterr().err
