"""Row gather."""

from __future__ import annotations

import pytest
import torch

from mii.ops import gather as gather_module
from mii.ops.gather import gather, gather_reference
from tests.ops.kernel_checks import DTYPES, in_wider_rows, kernels_only, poisoned, shifted

WIDTHS = (1, 3, 8, 31, 96, 576, 4096, 4104, 20000)


def test_reference_takes_the_named_rows() -> None:
    x, out = torch.arange(12.0).view(4, 3), torch.empty(3, 3)
    gather_reference(out, x, torch.tensor([3, 0, 3], dtype=torch.int32))
    assert out.tolist() == [[9, 10, 11], [0, 1, 2], [9, 10, 11]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(2, 4)}, "one row for each int32 index"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "int64"),
        ({"out": torch.empty(3, 8)[:, ::2]}, "out must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {"out": torch.empty(3, 4), "x": torch.empty(5, 4), "index": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        gather(**{**good, **change})


def check_kernel(device: str, dtype: torch.dtype, width: int) -> None:
    """One width, exactly: no rows, repeated rows, strided and unaligned rows."""
    plain = torch.randn(9, width, device=device).to(dtype)
    for x in (plain, in_wider_rows(plain, 8), in_wider_rows(plain, 5, 1), shifted(plain)):
        for rows in (0, 1, 5, 70):
            index = torch.randint(0, 9, (rows,), dtype=torch.int32, device=device)
            out = poisoned(rows, width, dtype=dtype, device=device)
            with kernels_only(gather_module):
                gather(out, x, index)
            assert torch.equal(out, plain[index.long()])


@pytest.mark.parametrize("width", WIDTHS[:6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(native_device: str, dtype: torch.dtype, width: int) -> None:
    check_kernel(native_device, dtype, width)
