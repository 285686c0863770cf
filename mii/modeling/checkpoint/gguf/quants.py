"""The block formats of GGUF tensors and how they become floats again.

A row is a sequence of blocks, each a few bytes of scales and the packed numbers. The bodies here are plain torch on
[blocks, bytes] tensors, in slices that stay in the cache; csrc/cpu/isa/gguf.cpp does the same for the common formats,
faster and without a care for busy processors. The formats are those of ggml; the arithmetic keeps its order of float32
operations, so that results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mii.ops import abi, native

_SLICE_ELEMENTS = 1 << 19  # of float32: 2 MiB, a few of which fit the second-level caches


@dataclass(frozen=True, slots=True)
class QuantType:
    """A tensor type: `block_size` numbers are stored in `type_size` bytes.

    `number` is what the file calls it. `dtype` is set for plain types, `unpack` ([n, type_size] uint8 ->
    [n, block_size] float32) for the others; a type with neither is known by name and size, and cannot be read.
    """

    number: int
    name: str
    block_size: int
    type_size: int
    dtype: torch.dtype | None = None
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def readable(self) -> bool:
        return self.dtype is not None or self.unpack is not None


def dequantise(type_: QuantType, raw: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes the numbers of packed rows.

    Args:
        type_: a quantised type.
        raw: [rows, bytes of a row] uint8.
        out: [rows, row length], contiguous, of any float dtype; rounded to nearest even from float32.
    """
    assert type_.unpack is not None
    blocks, values = raw.reshape(-1, type_.type_size).contiguous(), out.view(-1, type_.block_size)
    if not _unpacked_natively(type_, blocks, values):
        step = max(1, _SLICE_ELEMENTS // type_.block_size)
        for start in range(0, blocks.shape[0], step):
            values[start : start + step] = type_.unpack(blocks[start : start + step])
    return out


def _unpacked_natively(type_: QuantType, blocks: torch.Tensor, values: torch.Tensor) -> bool:
    """Runs the CPU library's body where it has one for this format; its threads do not mind a busy machine."""
    library = native.library(blocks.device)
    if library is None or not library.has("mii_unpack") or values.dtype not in abi.DTYPE_CODES:
        return False
    arguments = abi.MiiUnpack(
        out=values.data_ptr(),
        blocks=blocks.data_ptr(),
        count=blocks.shape[0],
        type=type_.number,
        dtype=abi.DTYPE_CODES[values.dtype],
    )
    return library.call("mii_unpack", arguments)


def _fields(packed: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Bit fields of bytes: [n, groups * width] -> [n, groups * (8 // bits) * width].

    Each group of `width` bytes gives first the lowest `bits` of all its bytes, then the next ones, and so on.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    fields = (packed.reshape(packed.shape[0], -1, 1, width) >> shifts).bitwise_and_((1 << bits) - 1)
    return fields.view(packed.shape[0], -1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte of every block, [n, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(packed: torch.Tensor) -> torch.Tensor:
    return packed.contiguous().view(torch.int8).float()


def _table(values: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[codes.int()]


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _fields(b[:, 2:], 16, 4).float().sub_(8).mul_(_half(b, 0))


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _fields(b[:, 4:], 16, 4).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    high = _fields(b[:, 2:6], 1, 1) << 4
    return _fields(b[:, 6:], 16, 4).bitwise_or_(high).float().sub_(16).mul_(_half(b, 0))


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    high = _fields(b[:, 4:8], 1, 1) << 4
    return _fields(b[:, 8:], 16, 4).bitwise_or_(high).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _signed(b[:, 2:]).mul_(_half(b, 0))


def _groups(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """values * scale (- offset), where each column of scale [n, groups] serves one group of the 256 numbers."""
    grouped = values.float().view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    if offset is not None:
        grouped.sub_(offset.unsqueeze(-1))
    return grouped.view(values.shape)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales = b[:, :16]
    scale, offset = _half(b, 80) * (scales & 15).float(), _half(b, 82) * (scales >> 4).float()
    return _groups(_fields(b[:, 16:80], 32, 2), scale, offset)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    low, high = _fields(b[:, 96:104], 8, 4), _fields(b[:, 104:108], 4, 2)
    scale = _half(b, 108) * (low | high << 4).float().sub_(32)
    numbers = _fields(b[:, 32:96], 32, 2).bitwise_or_(_fields(b[:, :32], 32, 1) << 2)
    return _groups(numbers.float().sub_(4), scale)


def _six_bit_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight offsets out of bytes 4 to 16 (Q4_K and Q5_K), each times its float16 at byte 0 or 2."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    offset = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return _half(b, 0) * scale.float(), _half(b, 2) * offset.float()


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    return _groups(_fields(b[:, 16:], 32, 4), *_six_bit_scales(b))


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    high = _fields(b[:, 16:48], 32, 1) << 4
    return _groups(_fields(b[:, 48:], 32, 4).bitwise_or_(high), *_six_bit_scales(b))


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    numbers = _fields(b[:, :128], 64, 4).bitwise_or_(_fields(b[:, 128:192], 32, 2) << 4)
    return _groups(numbers.float().sub_(32), _half(b, 208) * _signed(b[:, 192:208]))


def _q8_k(b: torch.Tensor) -> torch.Tensor:
    return _signed(b[:, 4:260]).mul_(b[:, :4].contiguous().view(torch.float32))  # from byte 260: sums


_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    return _table(_NON_LINEAR, _fields(b[:, 2:], 16, 4)).mul_(_half(b, 0))


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    high, low = _fields(b[:, 2:4], 1, 2), _fields(b[:, 4:8], 1, 4)
    scale = _half(b, 0) * (low | high << 4).float().sub_(32)
    return _groups(_table(_NON_LINEAR, _fields(b[:, 8:], 16, 4)), scale)


def _tq2_0(b: torch.Tensor) -> torch.Tensor:
    return _fields(b[:, :64], 32, 2).float().sub_(1).mul_(_half(b, 64))


def _trits(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Base-3 digits, five (or four) in a byte, highest first: multiplying brings each in turn to the top."""
    powers = torch.tensor([1, 3, 9, 27, 81][:count], dtype=torch.uint8).view(1, 1, -1, 1)
    return (packed.reshape(packed.shape[0], -1, 1, width) * powers).view(packed.shape[0], -1)


def _tq1_0(b: torch.Tensor) -> torch.Tensor:
    top = torch.cat([_trits(b[:, :32], 32, 5), _trits(b[:, 32:48], 16, 5), _trits(b[:, 48:52], 4, 4)], dim=1)
    return (top.int() * 3 >> 8).float().sub_(1).mul_(_half(b, 52))


_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, so the scale is halved


def _mxfp4(b: torch.Tensor) -> torch.Tensor:
    exponent = b[:, :1].int()
    # 2 ** (exponent - 128); the two smallest are denormal, and built from their bits as well
    bits = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return _table(_FP4, _fields(b[:, 1:], 16, 4)).mul_(bits.view(torch.float32))


# By the numbers that the format gives them.
TYPES = {
    type_.number: type_
    for type_ in (
        QuantType(0, "F32", 1, 4, torch.float32),
        QuantType(1, "F16", 1, 2, torch.float16),
        QuantType(2, "Q4_0", 32, 18, unpack=_q4_0),
        QuantType(3, "Q4_1", 32, 20, unpack=_q4_1),
        QuantType(6, "Q5_0", 32, 22, unpack=_q5_0),
        QuantType(7, "Q5_1", 32, 24, unpack=_q5_1),
        QuantType(8, "Q8_0", 32, 34, unpack=_q8_0),
        QuantType(9, "Q8_1", 32, 36),
        QuantType(10, "Q2_K", 256, 84, unpack=_q2_k),
        QuantType(11, "Q3_K", 256, 110, unpack=_q3_k),
        QuantType(12, "Q4_K", 256, 144, unpack=_q4_k),
        QuantType(13, "Q5_K", 256, 176, unpack=_q5_k),
        QuantType(14, "Q6_K", 256, 210, unpack=_q6_k),
        QuantType(15, "Q8_K", 256, 292, unpack=_q8_k),
        QuantType(16, "IQ2_XXS", 256, 66),
        QuantType(17, "IQ2_XS", 256, 74),
        QuantType(18, "IQ3_XXS", 256, 98),
        QuantType(19, "IQ1_S", 256, 50),
        QuantType(20, "IQ4_NL", 32, 18, unpack=_iq4_nl),
        QuantType(21, "IQ3_S", 256, 110),
        QuantType(22, "IQ2_S", 256, 82),
        QuantType(23, "IQ4_XS", 256, 136, unpack=_iq4_xs),
        QuantType(24, "I8", 1, 1, torch.int8),
        QuantType(25, "I16", 1, 2, torch.int16),
        QuantType(26, "I32", 1, 4, torch.int32),
        QuantType(27, "I64", 1, 8, torch.int64),
        QuantType(28, "F64", 1, 8, torch.float64),
        QuantType(29, "IQ1_M", 256, 56),
        QuantType(30, "BF16", 1, 2, torch.bfloat16),
        QuantType(34, "TQ1_0", 256, 54, unpack=_tq1_0),
        QuantType(35, "TQ2_0", 256, 66, unpack=_tq2_0),
        QuantType(39, "MXFP4", 32, 17, unpack=_mxfp4),
        QuantType(40, "NVFP4", 64, 36),
        QuantType(41, "Q1_0", 128, 18),
    )
}
