"""benchmarks/card_many.py looks at the processes of all ranks, and its parts have commands that these programs take."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest

from benchmarks import run_replicas, run_starts
from mii.benchmark import offline
from tests.benchmark.test_card import SANITIZER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def many() -> ModuleType:
    spec = util.spec_from_file_location("card_many", ROOT / "benchmarks" / "card_many.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(many: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[str]]]:
    """A machine on which commands are written down instead of run."""
    commands: list[list[str]] = []

    def run(card: Any, command: list[str], log: IO[str], limit: float, **environment: str) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(many.Card, "run", run)
    return many.Card(folder, folder, folder, time.monotonic() + 100), commands


def test_the_sums_of_all_processes_are_looked_at(
    many: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests/gpu").mkdir(parents=True)
    name = "test_sums_are_those_in_the_order_of_the_ranks"
    (tmp_path / "tests/gpu/test_all_reduce.py").write_text(f"def {name}() -> None:\n    pass\n")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr(many, "find_sanitizer", lambda: str(tool))
    for key, value in {"PYTHON": sys.executable, "PLANTED": "2", "FOUND": "0", "TAKES_PADDING": ""}.items():
        monkeypatch.setenv(key, value)
    card = many.Card(tmp_path, tmp_path, tmp_path, time.monotonic() + 100)
    with open(card.log, "w") as log:
        outcome = many.sanitizer(card, log, 60.0)
    assert outcome.good
    assert "--target-processes all" in card.log.read_text()
    monkeypatch.setenv("FOUND", "1")
    with open(card.log, "w") as log:
        assert many.sanitizer(card, log, 60.0).figures["sums"] == "1 errors"


def test_the_bench_takes_what_it_is_given(many: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, commands = record(many, tmp_path, monkeypatch)
    args = argparse.Namespace(shapes=["llama3-70b"], gpus=4, offline="--repeats 1 --rows chat")
    (tmp_path / "offline-llama3-70b-4.json").write_text(json.dumps({"rows": [{}, {}]}))
    with open(card.log, "w") as log:
        assert many.offline(card, log, 10.0, args).figures == {"llama3-70b": "2 rows"}
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    taken = parser.parse_args(commands[0][5:])
    assert (taken.tensor_parallel, taken.repeats, taken.rows) == (4, 1, ["chat"])


def test_programs_take_the_options_of_their_parts(
    many: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, commands = record(many, tmp_path, monkeypatch)
    with open(card.log, "w") as log:
        assert not many.replicas(card, log, 10.0, gpus=2).good  # no file came of it
        assert not many.starts(card, log, 10.0, gpus=2, times=3).good
    assert run_replicas.read_arguments(commands[0][2:]).replicas == [1, 2]
    taken = run_starts.read_arguments(commands[1][2:])
    assert (taken.times, taken.ranks, taken.at_once) == (3, 2, 10)
