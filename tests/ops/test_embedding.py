"""Embedding: the reference against torch, the kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mii.ops import embedding as embedding_module
from mii.ops.embedding import embedding, embedding_reference
from tests.ops.kernel_checks import DTYPES, assert_close, kernels_only, poisoned, shifted

WIDTHS = (1, 3, 8, 31, 96, 576, 4096, 4104, 20000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_torch(dtype: torch.dtype) -> None:
    table, places = torch.randn(20, 12).to(dtype), torch.randn(9, 12).to(dtype)
    ids, positions = torch.randint(0, 20, (6,), dtype=torch.int32), torch.randint(0, 7, (6,), dtype=torch.int32)
    out = torch.empty(6, 12, dtype=dtype)
    embedding_reference(out, table, ids)
    assert torch.equal(out, torch.nn.functional.embedding(ids, table))
    embedding_reference(out, table, ids, position_table=places, positions=positions, position_offset=2)
    assert torch.equal(out, torch.nn.functional.embedding(ids, table) + places[(positions + 2).long()])
    embedding_reference(out, table, ids, scale=2.0)
    assert torch.equal(out, torch.nn.functional.embedding(ids, table) * 2)


def test_ids_outside_the_table_are_zero_rows_and_positions_are_clamped() -> None:
    table, places = torch.ones(4, 3), torch.arange(6.0).view(2, 3)
    ids, positions = torch.tensor([-1, 4, 3], dtype=torch.int32), torch.tensor([-5, 9, 0], dtype=torch.int32)
    out = torch.empty(3, 3)
    embedding_reference(out, table, ids, position_table=places, positions=positions)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5], [1, 2, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(2, 4)}, "one row for each int32 id"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "int64"),
        ({"table": torch.empty(4, 5).t()}, "contiguous"),
        ({"position_table": torch.empty(7, 4)}, "needs positions"),
        ({"position_table": torch.empty(7, 3), "positions": torch.zeros(3, dtype=torch.int32)}, "as wide as"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"out": torch.empty(3, 4), "table": torch.empty(5, 4), "ids": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        embedding(**{**good, **change})


def check_kernel(device: str, dtype: torch.dtype, width: int) -> None:
    """One width against the reference: rows, scale, positions, ids outside the table, alignment."""
    table, places = torch.randn(50, width, device=device).to(dtype), torch.randn(20, width, device=device).to(dtype)
    for rows in (0, 1, 5, 70):
        ids = torch.randint(-1, 51, (rows,), dtype=torch.int32, device=device)
        positions = torch.randint(-3, 30, (rows,), dtype=torch.int32, device=device)
        with_positions = {"position_table": places, "positions": positions, "position_offset": 2}
        for options, weight in (
            ({}, table),
            ({}, shifted(table)),
            ({"scale": 1.7}, table),
            (with_positions, table),
            ({"scale": 0.3, **with_positions}, table),
        ):
            out, expected = (poisoned(rows, width, dtype=dtype, device=device) for _ in range(2))
            with kernels_only(embedding_module):
                embedding(out, weight, ids, **options)  # type: ignore[arg-type]
            embedding_reference(expected, weight, ids, **options)  # type: ignore[arg-type]
            assert_close(out, expected)


@pytest.mark.parametrize("width", WIDTHS[:6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(native_device: str, dtype: torch.dtype, width: int) -> None:
    check_kernel(native_device, dtype, width)
