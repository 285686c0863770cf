"""benchmarks/card.py tells what was proven from what did not run, stops what takes too long, and says so at the end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "card.py"

# Stands in for compute-sanitizer: takes --padding only where told, runs the program, reports what a file says.
SANITIZER = """#!/bin/sh
for each in "$@"; do
    if [ "$each" = --padding ] && [ -z "$TAKES_PADDING" ]; then echo "unknown option"; exit 1; fi
done
while [ "$1" != "$PYTHON" ]; do shift; done
if [ "$2" = -c ]; then echo "========= ERROR SUMMARY: $PLANTED errors"; exit 0; fi
"$@"; code=$?
echo "========= ERROR SUMMARY: $FOUND errors"
exit $code
"""


@pytest.fixture(scope="module")
def card() -> ModuleType:
    spec = importlib.util.spec_from_file_location("card", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["card"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(card: ModuleType, tmp_path: Path) -> object:
    (tmp_path / "tests/gpu").mkdir(parents=True)
    return card.Card(tmp_path / "wheels", tmp_path, tmp_path, time.monotonic() + 100)


def fill_group(place: object, name: str, text: str) -> None:
    Path(place.work, "tests/gpu", name).write_text(text)  # type: ignore[attr-defined]


@pytest.fixture
def groups(card: ModuleType, place: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "SANITIZED", {"one": ("test_one.py", "")})
    fill_group(place, "test_one.py", "def test_it() -> None:\n    pass\n")
    tool = Path(place.work, "compute-sanitizer")  # type: ignore[attr-defined]
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr(card, "find_sanitizer", lambda: str(tool))
    for name, value in {"PYTHON": sys.executable, "PLANTED": "2", "FOUND": "0", "TAKES_PADDING": ""}.items():
        monkeypatch.setenv(name, value)


def run(card: ModuleType, place: object, part: str, limit: float = 60.0) -> object:
    parts = sys.modules["card_parts"]
    return parts.run_part(part, lambda log, seconds: getattr(card, part)(place, log, seconds), place, limit)


@pytest.mark.usefixtures("groups")
def test_the_sanitizer_is_told_what_its_version_takes(card: ModuleType, place: object) -> None:
    outcome = run(card, place, "sanitizer")
    assert outcome.good
    assert outcome.figures["with"] == " ".join(card.FILTERS[1])
    assert outcome.figures["one"].startswith("1 passed")


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize(
    ("name", "value", "key", "said"),
    [("PLANTED", "0", "planted error", "not reported"), ("FOUND", "3", "one", "3 errors")],
)
def test_a_blind_sanitizer_and_one_that_finds_errors_fail(
    card: ModuleType, place: object, monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    outcome = run(card, place, "sanitizer")
    assert not outcome.good
    assert outcome.figures[key] == said


@pytest.mark.usefixtures("groups")
def test_a_group_in_which_nothing_ran_fails(card: ModuleType, place: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_group(place, "test_one.py", "import pytest\n@pytest.mark.skip\ndef test_it() -> None:\n    pass\n")
    assert "0 passed" in run(card, place, "sanitizer").figures["one"]
    monkeypatch.setattr(card, "SANITIZED", {"two": ("test_two.py", "")})
    assert run(card, place, "sanitizer").figures["two"] == "no tests/gpu/test_two.py"


def test_the_planted_call_is_one_that_the_kernel_takes(card: ModuleType) -> None:
    """Within bounds, and on the CPU: the struct has these fields and the norm of ones is ones."""
    script = card.READ_OUT_OF_BOUNDS
    for name, value in {'"cuda"': '"cpu"', "rows=2": "rows=1", "torch.cuda.synchronize()": "pass"}.items():
        assert name in script
        script = script.replace(name, value)
    found: dict[str, object] = {}
    exec(script, found)
    out = found["out"]
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out[0], torch.ones(4096))


def test_what_takes_too_long_is_ended_with_all_its_processes(card: ModuleType, place: object) -> None:
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)"
    with open(Path(place.out, "log"), "w") as log:  # type: ignore[attr-defined]
        assert place.run([sys.executable, "-c", script], log, 2.0) == 124  # type: ignore[attr-defined]
    child = next(int(line) for line in Path(log.name).read_text().splitlines() if line.isdigit())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.02)
    assert not state or state.startswith("Z")


def test_a_folder_without_our_wheel_stops_everything(
    card: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels").mkdir()
    assert card.main(["--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out")]) == 1
    outcomes = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (tmp_path / "out" / "card.txt").exists()
    assert [(outcome["part"], outcome["good"]) for outcome in outcomes] == [("install", False)]
    assert "FAILED" in capsys.readouterr().out


def test_every_sanitized_group_selects_tests(card: ModuleType) -> None:
    """Collected as the sanitizer's runs collect them; a group whose file is not there yet is reported by the part."""
    from benchmarks.card_many import SANITIZED

    groups = [each for each in card.SANITIZED.values() if (PATH.parents[1] / "tests/gpu" / each[0]).exists()]
    script = """
import json, sys, pytest
class Collected:
    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]
collected = []
for name, wanted in json.loads(sys.argv[1]):
    plugin = Collected()
    options = ["-q", "--collect-only", "-p", "no:cacheprovider", *(["-k", wanted] if wanted else [])]
    pytest.main(["tests/gpu/" + name, *options], plugins=[plugin])
    collected.append(plugin.names)
print()
print(json.dumps(collected))
"""
    argument = json.dumps([*groups, ("test_all_reduce.py", SANITIZED)])
    done = subprocess.run([sys.executable, "-c", script, argument], cwd=PATH.parents[1], capture_output=True, text=True)
    *names, of_all_processes = json.loads(done.stdout.splitlines()[-1])
    assert all(len(each) > 1 for each in names), dict(zip(map(tuple, groups), names, strict=True))
    assert len(of_all_processes) == 6
    assert all(each.startswith("test_sums_are_those_in_the_order_of_the_ranks[") for each in of_all_processes)
