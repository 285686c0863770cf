"""benchmarks/check.py fails on a figure that falls short, and on a result that nothing is known about."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(tmp_path: Path, **rows: float) -> str:
    report: dict[str, Any] = {
        "benchmark": "offline",
        "machine": {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "a cpu"},
        "model": {"name": "llama3-8b", "layers": 32, "dtype": "bfloat16"},
        "rows": [
            {"name": name.replace("_", "-"), "value": value, "share": 0.5, "details": {}}
            for name, value in rows.items()
        ],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(report))
    return str(path)


def test_figures_that_are_good_enough_pass(check: ModuleType, tmp_path: Path) -> None:
    assert check.main([result(tmp_path, decode_1=5.5, chat=12_000.0, prefill_2048=50_000.0)]) == 0


@pytest.mark.parametrize("rows", [{"decode_1": 99.0}, {"prefill_2048": 3.0}, {"decode_1": 5.5, "decode_8": 99.0}])
def test_one_figure_that_falls_short_fails(check: ModuleType, tmp_path: Path, rows: dict[str, float]) -> None:
    assert check.main([result(tmp_path, **rows)]) == 1


def test_a_result_that_nothing_is_known_about_fails(check: ModuleType, tmp_path: Path) -> None:
    assert check.main([result(tmp_path, some_new_row=1.0)]) == 1


def kernels(tmp_path: Path, gpu: str, share: float, seconds: float) -> str:
    report = {
        "benchmark": "kernels",
        "machine": {"gpu": gpu, "cpu": "a cpu"},
        "cases": [
            {"kernel": "attention", "case": "decode 64 x 2048", "share": share, "seconds": 1e-4},
            {"kernel": "sampler", "case": "greedy, 128 rows", "share": 0.1, "seconds": seconds},
            {"kernel": "new", "case": "that nobody knows", "share": 0.0, "seconds": 1.0},
        ],
    }
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(report))
    return str(path)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize(("share", "seconds", "code"), [(0.95, 3e-5, 0), (0.5, 3e-5, 1), (0.95, 3e-4, 1)])
def test_kernels_are_compared_by_share_or_by_time(
    check: ModuleType, tmp_path: Path, gpu: str, share: float, seconds: float, code: int
) -> None:
    assert check.main([kernels(tmp_path, gpu, share, seconds)]) == code


def test_every_kernel_that_is_watched_was_measured_on_its_machine(check: ModuleType) -> None:
    """Else a case that was given another name is compared with nothing from then on."""
    reports = [json.loads(path.read_text()) for path in (PATH.parent / "results").glob("*.json")]
    for entry in json.loads(check.MINIMUM.read_text()):
        measured = {
            f"{case['kernel']} | {case['case']}"
            for report in reports
            if report["benchmark"] == "kernels" and any(name in check.device_of(report) for name in entry["devices"])
            for case in report["cases"]
        }
        assert entry.get("cases", {}).keys() <= measured


def test_kernels_of_an_unknown_machine_fail(check: ModuleType, tmp_path: Path) -> None:
    assert check.main([kernels(tmp_path, "NVIDIA A100", 1.0, 1e-6)]) == 1


def sums(tmp_path: Path, ranks: int, microseconds: float) -> str:
    report = {
        "benchmark": "all-reduce",
        "machine": {"gpu": "NVIDIA H200", "cpu": "a cpu"},
        "ranks": ranks,
        "results": [{"bytes": 16384, "us": {"nccl": 10.0, "norm one": microseconds}}],
    }
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(report))
    return str(path)


@pytest.mark.parametrize(("ranks", "microseconds", "code"), [(2, 5.5, 0), (2, 9.0, 1), (4, 5.5, 1)])
def test_sums_over_ranks_are_compared_by_time(
    check: ModuleType, tmp_path: Path, ranks: int, microseconds: float, code: int
) -> None:
    assert check.main([sums(tmp_path, ranks, microseconds)]) == code


def test_a_result_of_another_kind_is_one_that_nothing_is_known_about(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "starts.json"
    path.write_text(json.dumps({"benchmark": "starts", "machine": {"gpu": "NVIDIA H200", "cpu": "a cpu"}}))
    assert check.main([str(path)]) == 1
    assert "starts\n  nothing in minimum.json belongs to this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *("h100-llama3-8b.json", "h200-llama3-8b.json", "h200-llama3-8b-kernels.json", "h200-kernels-moe.json"),
        *("h200x2-llama3-8b.json", "h200x2-all-reduce.json"),
    ],
)
def test_the_results_that_are_kept_pass(check: ModuleType, name: str) -> None:
    assert check.main([str(PATH.parent / "results" / name)]) == 0


def test_kept_results_of_every_benchmark_are_good_enough_or_said_to_be_unknown(
    check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    results = sorted((PATH.parent / "results").glob("*.json"))
    assert len({json.loads(path.read_text())["benchmark"] for path in results}) >= 6
    for path in results:
        passed, said = check.main([str(path)]) == 0, capsys.readouterr().out
        assert "SHORT" not in said
        assert passed == ("nothing in minimum.json" not in said)
