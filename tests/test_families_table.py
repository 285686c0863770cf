"""docs/families.md is brought up to date by figure: what a run did not measure stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families_table import FamiliesTable


def test_runs_of_two_machines_fill_one_table(tmp_path: Path) -> None:
    path = tmp_path / "families.md"
    here, there = FamiliesTable(), FamiliesTable()
    here.record("Llama", "tied", "fp32 on a CPU", "3.0e-07")
    here.record("Bloom", "plain", "fp32 on a CPU", "1.0e-06")
    here.write(path)
    there.record("Llama", "tied", "bf16 on a GPU", "1.5 ulp")
    there.record("Llama", "tied", "fp32 on a CPU", "4.0e-07")
    there.write(path)
    assert path.read_text().splitlines()[-2:] == [
        "| Bloom | plain | 1.0e-06 |  |  |  |",
        "| Llama | tied | 4.0e-07 |  | 1.5 ulp |  |",
    ]


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match="no column 'fp8'"):
        FamiliesTable().record("Llama", "tied", "fp8", "1")
