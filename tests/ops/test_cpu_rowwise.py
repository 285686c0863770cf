"""Embedding, gather, norm, rotary embedding, activation and step preparation: each instruction set against torch."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi
from mii.ops.activation import activation, activation_reference
from mii.ops.embedding import embedding, embedding_reference
from mii.ops.gather import gather
from mii.ops.norm import norm, norm_reference
from mii.ops.rope_kv import rope_kv, rope_kv_reference
from tests.ops.cpu_library import DTYPES, ISAS, assert_close, using

WIDTHS = (1, 3, 16, 31, 64, 576)
ROWS = (0, 1, 5, 70)  # the last one is cut among threads at the wider widths


def _poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_equals_reference_and_unknown_ids_are_zero_rows(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for rows in ROWS:
            table, places = torch.randn(50, width).to(dtype), torch.randn(20, width).to(dtype)
            ids = torch.randint(-1, 51, (rows,), dtype=torch.int32)
            positions = torch.randint(0, 30, (rows,), dtype=torch.int32)
            for options in (
                {},
                {"scale": 1.7},
                {"position_table": places, "positions": positions, "position_offset": 2},
            ):
                out, expected = _poisoned(rows, width, dtype=dtype), _poisoned(rows, width, dtype=dtype)
                with using(isa):
                    embedding(out, table, ids, **options)
                embedding_reference(expected, table, ids, **options)
                assert_close(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_copies_rows_of_a_strided_tensor(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x = torch.randn(9, width + 5).to(dtype)[:, :width]
        index = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
        out = _poisoned(4, width, dtype=dtype)
        with using(isa):
            gather(out, x, index)
        assert torch.equal(out, x[index])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [abi.RMS, abi.RMS_PLUS1, abi.LAYER])
def test_norm_equals_reference(isa: str, dtype: torch.dtype, kind: int) -> None:
    for width in WIDTHS:
        for rows in ROWS:
            x = (torch.randn(rows, width + 8) * 3).to(dtype)[:, :width]
            weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
            for residual in (None, torch.randn(rows, width).to(dtype)):
                for w, b in ((weight, bias if kind == abi.LAYER else None), (None, None)):
                    out, expected = (
                        _poisoned(rows, width + 3, dtype=dtype)[:, :width],
                        _poisoned(rows, width, dtype=dtype),
                    )
                    own, theirs = (None if residual is None else residual.clone() for _ in range(2))
                    with using(isa):
                        norm(out, x, w, eps=1e-5, bias=b, residual=own, kind=kind)
                    norm_reference(expected, x, w, eps=1e-5, bias=b, residual=theirs, kind=kind)
                    assert_close(out, expected, scale=2)
                    if own is not None:
                        assert torch.equal(own, theirs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_cache_write_equal_reference(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    for q_heads, kv_heads, head_dim, rotary_dim in (
        (4, 4, 64, 64),
        (9, 3, 64, 64),
        (6, 2, 80, 32),
        (3, 1, 20, 20),
        (2, 1, 8, 2),
    ):
        for tokens, normed in ((1, False), (7, True), (40, False)):
            _check_rope(isa, dtype, (q_heads, kv_heads, head_dim, rotary_dim), tokens, normed, interleaved)


def _check_rope(
    isa: str, dtype: torch.dtype, heads: tuple[int, int, int, int], tokens: int, normed: bool, interleaved: bool
) -> None:
    q_heads, kv_heads, head_dim, rotary_dim = heads
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim + 4).to(dtype)[:, :-4]
    angles = torch.rand(60, rotary_dim // 2) * 6
    slots = torch.randperm(64)[:tokens].to(torch.int32)
    slots[tokens // 2] = -1
    options = {
        "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "rotary_dim": rotary_dim, "interleaved": interleaved,
        "q_norm": torch.randn(head_dim).to(dtype) if normed else None,
        "k_norm": torch.randn(head_dim).to(dtype) if normed else None,
        "norm_kind": abi.RMS_PLUS1 if tokens > 10 else abi.RMS,
    }  # fmt: skip
    rest = (torch.cat((angles.cos(), angles.sin()), 1), torch.randint(0, 60, (tokens,), dtype=torch.int32), slots)
    own, theirs = (
        (qkv.clone(), *(_poisoned(4, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2))) for _ in range(2)
    )
    with using(isa):
        rope_kv(*own, *rest, **options)
    rope_kv_reference(*theirs, *rest, **options)
    assert_close(own[0], theirs[0], scale=2)
    for mine, other in zip(own[1:], theirs[1:], strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
        assert_close(mine.nan_to_num(), other.nan_to_num(), scale=2)


@pytest.mark.parametrize("isa", ISAS)
def test_rope_without_table_or_cache_changes_nothing(isa: str) -> None:
    qkv = torch.randn(3, 5 * 16)
    before, positions = qkv.clone(), torch.zeros(3, dtype=torch.int32)
    with using(isa):
        rope_kv(qkv, None, None, None, positions, None, q_heads=3, kv_heads=1, head_dim=16, rotary_dim=16)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(abi.ACTIVATIONS))
def test_activation_equals_reference(isa: str, dtype: torch.dtype, kind: str) -> None:
    for width in WIDTHS:
        for rows in ROWS:
            for gated in (False, True):
                wide = width * 2 if gated else width
                x = (torch.randn(rows, wide + 3) * 4).to(dtype)[:, :wide]
                for bias in (None, torch.randn(wide).to(dtype)):
                    out, expected = _poisoned(rows, width, dtype=dtype), _poisoned(rows, width, dtype=dtype)
                    with using(isa):
                        activation(out, x, kind, gated=gated, bias=bias)
                    activation_reference(expected, x, kind, gated=gated, bias=bias)
                    assert_close(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(abi.ACTIVATIONS))
def test_activation_of_extreme_values_is_finite_and_nan_stays(isa: str, kind: str) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 1e-30, 90.0, 200.0, 1e4, torch.nan]])
    out = torch.zeros_like(x)
    with using(isa):
        activation(out, x, kind, gated=False)
    expected = torch.zeros_like(x)
    activation_reference(expected, x, kind, gated=False)
    assert out[0, :-1].isfinite().all()
    assert out[0, -1].isnan()
    assert_close(out[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_value_survives_the_conversions(isa: str) -> None:
    """A norm-free pass through float: x * 1 by the embedding with a scale and its inverse exactly representable."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
        values = torch.where(values.isfinite() & (values.abs() > torch.finfo(dtype).tiny * 2), values, 0.0)
        ids = torch.arange(values.shape[0], dtype=torch.int32)
        out = _poisoned(*values.shape, dtype=dtype)
        with using(isa):
            embedding(out, values.contiguous(), ids, scale=0.5)
        assert torch.equal(out, values * 0.5)
