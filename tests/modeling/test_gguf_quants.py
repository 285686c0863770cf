"""Unpacking of GGUF's block formats, bit for bit against the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from mii.modeling.checkpoint.gguf import quants
from mii.modeling.checkpoint.gguf.quants import TYPES, QuantType, dequantise

QUANTISED = [(number, type_) for number, type_ in TYPES.items() if type_.unpack is not None]
NAMES = [type_.name for _, type_ in QUANTISED]


def blocks(type_: QuantType, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, per_row * type_.type_size), dtype=np.uint8)


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """Float32 bits with every NaN the same."""
    array = np.array(values.numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float32)
    array[np.isnan(array)] = np.nan
    return array.view(np.uint32)


@pytest.mark.parametrize(("number", "type_"), QUANTISED, ids=NAMES)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_random_blocks_unpack_as_in_the_gguf_package(number: int, type_: QuantType) -> None:
    raw = blocks(type_, 33, 3)  # random scales too: infinities, NaN, denormal numbers and negative zeros occur
    out = torch.full((33, 3 * type_.block_size), torch.nan)
    dequantise(type_, torch.from_numpy(raw), out)
    if type_.name == "Q8_K":  # never stored by itself, so the package does not unpack it
        split = raw.reshape(-1, 292)
        scale = np.ascontiguousarray(split[:, :4]).view(np.float32)
        expected = (split[:, 4:260].view(np.int8).astype(np.float32) * scale).reshape(33, -1)
    else:
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize(("number", "type_"), [(n, t) for n, t in TYPES.items() if t.name != "Q8_1"])
def test_block_sizes_are_those_of_the_gguf_package(number: int, type_: QuantType) -> None:
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (type_.name, (type_.block_size, type_.type_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_from_float32(dtype: torch.dtype) -> None:
    type_ = TYPES[12]
    raw = torch.from_numpy(blocks(type_, 8, 2))
    full = dequantise(type_, raw, torch.empty(8, 512))
    half = dequantise(type_, raw, torch.empty(8, 512, dtype=dtype))
    assert torch.equal(half.nan_to_num(), full.to(dtype).nan_to_num())


def test_tensors_larger_than_a_slice_are_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    type_ = TYPES[8]
    raw = torch.from_numpy(blocks(type_, 7, 5))
    whole = dequantise(type_, raw, torch.empty(7, 160))
    monkeypatch.setattr(quants, "_SLICE_ELEMENTS", 96)  # three blocks at a time, and a rest of two
    assert np.array_equal(bits(dequantise(type_, raw, torch.full((7, 160), torch.nan))), bits(whole))
