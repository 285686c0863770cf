"""Unpacking of GGUF's block formats, by every body, bit for bit against the `gguf` package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mii.modeling.checkpoint.gguf import quants
from mii.modeling.checkpoint.gguf.quants import TYPES, QuantType, dequantise
from mii.ops import native
from tests.ops.cpu_library import ISAS, using

QUANTISED = [type_ for type_ in TYPES.values() if type_.unpack is not None]
NATIVE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


@pytest.fixture(params=["torch", *ISAS])
def body(request: pytest.FixtureRequest) -> Iterator[str]:
    """The plain torch body, or the CPU library with one instruction set."""
    chosen = native.reference_ops() if request.param == "torch" else using(request.param)
    with chosen:
        yield request.param


def blocks(type_: QuantType, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    """Random bytes, so random scales too: infinities, NaN, denormal numbers and negative zeros occur."""
    return np.random.default_rng(seed).integers(0, 256, (rows, per_row * type_.type_size), dtype=np.uint8)


def bits(values: Any) -> np.ndarray:
    """Float32 bits with every NaN the same."""
    array = np.array(values.float().numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float32)
    array[np.isnan(array)] = np.nan
    return array.view(np.uint32)


def reference(type_: QuantType, raw: np.ndarray) -> np.ndarray:
    if type_.name == "Q8_K":  # never stored by itself, so the package does not unpack it
        split = raw.reshape(-1, 292)
        scale = np.ascontiguousarray(split[:, :4]).view(np.float32)
        return (split[:, 4:260].view(np.int8).astype(np.float32) * scale).reshape(len(raw), -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_.number))


@pytest.mark.parametrize("type_", QUANTISED, ids=lambda type_: type_.name)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_random_blocks_unpack_as_in_the_gguf_package(body: str, type_: QuantType) -> None:
    raw = blocks(type_, 33, 3)
    out = torch.full((33, 3 * type_.block_size), torch.nan)
    dequantise(type_, torch.from_numpy(raw), out)
    np.testing.assert_array_equal(bits(out), bits(reference(type_, raw)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NATIVE)
def test_half_precision_is_rounded_from_float32(body: str, name: str, dtype: torch.dtype) -> None:
    type_ = next(type_ for type_ in QUANTISED if type_.name == name)
    raw = torch.from_numpy(blocks(type_, 8, 16))
    full = dequantise(type_, raw, torch.empty(8, 16 * type_.block_size))
    half = dequantise(type_, raw, torch.empty(8, 16 * type_.block_size, dtype=dtype))
    np.testing.assert_array_equal(bits(half), bits(full.to(dtype)))


@pytest.mark.parametrize("name", NATIVE)
def test_the_library_has_code_for_the_common_formats(name: str) -> None:
    with using("plain") as library:
        type_ = next(type_ for type_ in QUANTISED if type_.name == name)
        raw, out = torch.zeros(1, type_.type_size, dtype=torch.uint8), torch.full((1, type_.block_size), torch.nan)
        assert library.has("mii_unpack")
        assert quants._unpacked_natively(type_, raw, out)
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
@pytest.mark.parametrize("plain", [True, False], ids=["torch", "native"])
def test_tensors_of_every_length_are_unpacked_whole(rows: int, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    type_ = TYPES[8]
    raw = torch.from_numpy(blocks(type_, rows, 5))
    monkeypatch.setattr(quants, "_SLICE_ELEMENTS", 96 * 32)  # so that the torch body has many slices and a rest
    with native.reference_ops() if plain else nullcontext():
        out = dequantise(type_, raw, torch.full((rows, 160), torch.nan))
    expected = type_.unpack(raw.view(-1, 34)).view(rows, 160)
    np.testing.assert_array_equal(bits(out), bits(expected))


def test_columns_cut_out_of_the_rows_are_unpacked() -> None:
    type_ = TYPES[12]
    raw = torch.from_numpy(blocks(type_, 4, 3))
    whole = dequantise(type_, raw, torch.empty(4, 768))
    middle = dequantise(type_, raw[:, 144:288], torch.empty(4, 256))
    np.testing.assert_array_equal(bits(middle), bits(whole[:, 256:512]))


@pytest.mark.parametrize("type_", [type_ for type_ in TYPES.values() if type_.name != "Q8_1"], ids=lambda t: t.name)
def test_block_sizes_are_those_of_the_gguf_package(type_: QuantType) -> None:
    kind = gguf.GGMLQuantizationType(type_.number)
    assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (type_.name, (type_.block_size, type_.type_size))
