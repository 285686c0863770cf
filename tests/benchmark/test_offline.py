"""`mii bench offline` on a model of two layers: every figure is there, counted right, and written to the JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mii.batching.data_classes import EngineRequest
from mii.benchmark import offline
from mii.benchmark.shapes import Job, make_batch
from mii.benchmark.workload import run_jobs
from mii.errors import CheckpointNotFoundError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--option", "memory_fraction=0.02", *arguments])


def test_the_command_prints_and_writes_its_figures(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deeper" / "result.json"
    rows = ("decode-1", "batch-16")
    arguments = parse("--shape", str(tiny_llama), "--rows", *rows, "--repeats", "1", "--json", str(path))
    assert offline.run(arguments) == 0
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["rows"]] == ["ready", *rows]
    ready, decode, batch = report["rows"]
    assert ready["value"] > 0
    assert all(row["limit"] > 0 and row["share"] is not None for row in (decode, batch))
    assert report["model"]["layers"] == 2
    assert report["limits"]["bandwidth_bytes_per_s"] > 0
    assert report["memory_bytes"]["peak"] > report["memory_bytes"]["weights"] > 0
    assert {"date", "command", "machine", "versions"} <= report.keys()
    assert decode["samples"] == [decode["value"]]
    assert decode["details"]["tokens_per_s"] == pytest.approx(1e3 / decode["value"])
    assert (batch["details"]["answer_tokens"], batch["details"]["prompt_tokens"]) == (16 * 64, 16 * 128)
    assert batch["value"] == pytest.approx(16 * 64 / batch["details"]["seconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_a_run_counts_what_came_back() -> None:
    engine = offline.load(parse("--shape", "smollm2-135m", "--layers", "1"))
    try:
        jobs = [*make_batch(3, 20, 7, engine.vocab_size), Job([5, 6, 7], 1)]
        run = run_jobs(engine, jobs)
        assert (run.prompt_tokens, run.answer_tokens) == (63, 22)
        assert 7 <= run.steps <= 8
        assert 0 < run.first_token_seconds <= run.seconds
        assert not engine.has_work
    finally:
        engine.destroy()


def test_a_request_that_ends_early_is_no_figure() -> None:
    engine = offline.load(parse("--shape", "smollm2-135m", "--layers", "1", "--option", "max_length=64"))
    try:
        with pytest.raises(RuntimeError, match="before their length"):
            run_jobs(engine, make_batch(2, 60, 10, engine.vocab_size))
    finally:
        engine.destroy()


def test_a_real_model_folder_is_taken_as_it_is(tiny_llama: Path) -> None:
    engine = offline.load(parse("--shape", str(tiny_llama), "--dtype", "fp32"))
    try:
        engine.add_request(EngineRequest(uid=1, prompt_ids=[5, 6], max_new_tokens=2))
        while engine.has_work:
            engine.step()
    finally:
        engine.destroy()


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointNotFoundError, match="llama3-8b, mistral-7b"):
        offline.load(parse("--shape", "llama9-1b"))


def test_a_process_cannot_be_timed_on_weights_without_a_file() -> None:
    with pytest.raises(CheckpointNotFoundError, match="made up in memory"):
        offline._model_file("llama3-8b")


@pytest.mark.parametrize("arguments", [("--rows", "nonsense"), ("--layers", "0"), ("--option", "no-equals-sign")])
def test_wrong_options_end_the_command_with_code_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
