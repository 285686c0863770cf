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
