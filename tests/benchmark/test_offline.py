"""`mii bench offline` on a model of two layers: every figure is there, counted right, and written to the JSON file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mii.batching.data_classes import EngineRequest
from mii.benchmark import offline, start
from mii.benchmark.memory import memory_ledger
from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.shapes import SHAPES, Job, make_batch
from mii.benchmark.start import start_row
from mii.benchmark.workload import run_jobs
from mii.errors import CheckpointNotFoundError, PlacementError, UnsupportedFeatureError
from mii.modeling.checkpoint import open_checkpoint


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
    memory = report["memory_bytes"]
    assert memory["used"] > memory["weights"] > 0
    assert memory["kv_cache"] > 0 < memory["activations"]
    assert {"date", "command", "machine", "versions"} <= report.keys()
    assert decode["samples"] == [decode["value"]]
    assert decode["details"]["tokens_per_s"] == pytest.approx(1e3 / decode["value"])
    assert (batch["details"]["answer_tokens"], batch["details"]["prompt_tokens"]) == (16 * 64, 16 * 128)
    assert batch["value"] == pytest.approx(16 * 64 / batch["details"]["seconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_two_ranks_are_started_measured_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    shape = ("--shape", "smollm2-135m", "--layers", "1", "--dtype", "fp32", "--tensor-parallel", "2")
    shape += ("--option", "memory_fraction=0.1")  # what both ranks take counts
    arguments = parse(*shape, "--rows", "decode-1", "--repeats", "1", "--json", str(path))
    assert offline.run(arguments) == 0
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["rows"]] == ["ready", "decode-1"]
    assert report["model"]["tensor_parallel"] == 2
    assert report["rows"][1]["limit"] > 0
    whole = 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 49152 * 576  # one layer and the embedding, which both ranks have
    assert 0.5 < report["memory_bytes"]["weights"] / 4 / (whole + 2 * 576) < 0.98
    assert not multiprocessing.active_children()


def test_what_keeps_a_rank_from_its_part_is_said_once(
    make_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlacementError, match="1 attention heads"):
        offline.run(parse("--shape", str(make_checkpoint(num_attention_heads=1)), "--tensor-parallel", "2"))
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("row", ["start", "first-token"])
def test_rows_of_one_process_are_refused_of_several(row: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"--rows {row} is of one process"):
        offline.run(parse("--shape", "smollm2-135m", "--tensor-parallel", "2", "--rows", row))


def test_the_weights_of_the_ledger_are_those_of_the_files(tiny_llama: Path) -> None:
    engine = offline.load(parse("--shape", str(tiny_llama), "--dtype", "fp32"))
    with open_checkpoint(tiny_llama) as checkpoint:
        stored = sum(checkpoint.stored_bytes(name) for name in checkpoint.names())
    assert memory_ledger(engine)["weights"] == stored
    engine.destroy()


def test_a_start_is_timed_on_a_checkpoint_that_is_written_for_it() -> None:
    config = dict(SHAPES["smollm2-135m"]) | {"num_hidden_layers": 1, "vocab_size": 1000}
    row = start_row(config, {"device": "cpu", "memory_fraction": 0.02}, runs=1)
    phases = row.details["phases_of_the_last"]
    assert row.value == row.samples[0] > phases["weights"] > 0
    assert row.details["bytes"] == 2 * (1000 * 576 + 576 + 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 2 * 576)


def test_a_checkpoint_in_shards_is_read_as_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_SHARD", 500_000)
    config = dict(SHAPES["smollm2-135m"]) | {"num_hidden_layers": 2, "vocab_size": 300}
    made = RandomCheckpoint(config, torch.device("cpu"))
    start.write_checkpoint(tmp_path, made)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with open_checkpoint(tmp_path) as read:
        assert set(read.names()) == set(made.names())
        assert all(torch.equal(read.get(name), made.get(name)) for name in made.names())


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
