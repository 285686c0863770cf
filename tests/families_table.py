"""docs/families.md: how far every variant's logits lie from transformers', written by the test runs that measure it.

    pytest tests/modeling/test_families.py --families-table docs/families.md      (CPU: the column fp32)
    pytest tests/gpu/test_families.py --families-table docs/families.md           (a card: fp32, bf16 and fp16 there)

A run replaces the figures that it measured and leaves the others, so either machine keeps the table up to date.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

COLUMNS = ("fp32 on a CPU", "fp32 on a GPU", "bf16 on a GPU", "fp16 on a GPU")
_HEAD = """# Model families and their measured errors

Each row is a small checkpoint with random weights that turns one option on. The figures are the largest difference of
a logit from transformers' on the same weights: in fp32 as a share of the largest logit (at most 1e-4 is allowed), in
bf16 and fp16 in units in the last place of the largest logit (at most 8, or twice as far as transformers itself is
from the exact logits, where that is more). Where a figure stands, greedy decoding gave transformers' tokens too, but
for ties within that difference in bf16 and fp16. In these, checkpoints with experts make the choice of experts plain:
between two that are nearly alike rounding would decide, and a right program could take either. The test runs write
this file (`--families-table`), in one process or several (`-n`).
"""
Row = tuple[str, str]


class FamiliesTable:
    """The table's figures by (family, option) and column."""

    def __init__(self) -> None:
        self.figures: dict[Row, dict[str, str]] = {}

    def record(self, family: str, option: str, column: str, figure: str) -> None:
        """Notes a measured figure. The columns are those of `COLUMNS`."""
        if column not in COLUMNS:
            raise ValueError(f"The table has no column {column!r}; it has {', '.join(COLUMNS)}.")
        self.figures.setdefault((family, option), {})[column] = figure

    def write(self, path: Path) -> None:
        """Brings a file up to date with the figures; several processes may do so at the same time."""
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            rows = _read(path)
            for row, figures in self.figures.items():
                rows.setdefault(row, {}).update(figures)
            lines = [_line("family", "option", *COLUMNS), _line(*["---"] * (2 + len(COLUMNS)))]
            lines += [_line(*row, *(rows[row].get(column, "") for column in COLUMNS)) for row in sorted(rows)]
            path.write_text(f"{_HEAD}\n" + "\n".join(lines) + "\n")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _read(path: Path) -> dict[Row, dict[str, str]]:
    if not path.is_file():
        return {}
    table = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {
        (family, option): {column: figure for column, figure in zip(COLUMNS, figures, strict=True) if figure}
        for family, option, *figures in cells
    }
