"""The Hopper kernel of prompts, run on the host: its device code against the stand-ins of tests/ops/device.

What this cannot show is whether the hardware reads descriptors and fragments as the PTX ISA says.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.ops.attention_cases import Case, Shape, make_case, struct_of
from tests.ops.device_library import device_library
from tests.ops.test_attention import VARIANTS

ROWS, KEYS, ALONE = 128, 64, 16  # packed rows of an item, keys of its unit, packed rows that are no prompt
SHAPE = Shape(q_heads=4, kv_heads=1, head_dim=128, block_size=64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = device_library("attention_hopper", tmp_path_factory.mktemp("hopper"))
    loaded.hopper_on_host.restype = ctypes.c_char_p
    return loaded


def items_of(case: Case, parts: int) -> torch.Tensor:
    """[items, 8] prefill items, those of each sequence cut into up to `parts` parts along the keys."""
    shape = case.shape
    group = shape.q_heads // shape.kv_heads
    items, slot = [], 0
    for seq, (q_len, kv_len) in enumerate(case.lengths):
        if q_len * group <= ALONE:
            continue
        for row in range((q_len * group - 1) // ROWS * ROWS, -1, -ROWS):
            first = kv_len - q_len
            last = first + (min(row + ROWS, q_len * group) - 1) // group
            begin = max(0, first + row // group - shape.window + 1) // KEYS if shape.window else 0
            end = last // KEYS + 1
            count = min(parts, end - begin)
            cuts = [begin + (end - begin) * part // count for part in range(count + 1)]
            items += [[seq, row, cuts[part], cuts[part + 1], part, count, slot, 0] for part in range(count)]
            slot += count * shape.kv_heads if count > 1 else 0
    return torch.tensor(items, dtype=torch.int32).reshape(-1, 8)


def run(library: ctypes.CDLL, case: Case, *, parts: int = 1, ctas: int = 2) -> torch.Tensor:
    """The kernel's answer; rows of sequences that are no prompts keep what they held."""
    shape, out = case.shape, case.new_out()
    items = items_of(case, parts)
    counters = torch.zeros(32 + 8 * len(items) * shape.kv_heads, dtype=torch.int32)
    partial = torch.full((4 * len(items) * shape.kv_heads, ROWS * (shape.head_dim + 2)), torch.nan)
    args = struct_of(case, out)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (items, counters, partial)]
    box_rows = min(64, shape.block_size)
    failure = library.hopper_on_host(ctypes.byref(args), pointers[0], len(items), *pointers[1:], box_rows, ctas)
    assert failure is None, failure.decode()
    assert not bool(counters.any()), "counters are not zero again"
    return out


def check(library: ctypes.CDLL, case: Case, **options: int) -> None:
    """Prompts against the reference; all else must be untouched, so it is put in only then."""
    out = run(library, case, **options)
    expected, group, start = case.reference(), case.shape.q_heads // case.shape.kv_heads, 0
    for q_len, _ in case.lengths:
        if 0 < q_len * group <= ALONE:
            rows = slice(start, start + q_len)
            assert bool((out[rows] == case.new_out()[rows]).all()), f"rows {rows} are no prompt's"
            out[rows] = expected[rows].to(out.dtype)
        start += q_len
    case.check(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_chunks_and_prompts(library: ctypes.CDLL, variant: str) -> None:
    lengths = [(5, 5), (33, 150), (1, 77), (0, 0), (64, 64), (17, 300)]
    check(library, make_case(lengths, SHAPE.with_(**VARIANTS[variant])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_heads_blocks_and_dtypes(library: ctypes.CDLL, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = SHAPE.with_(q_heads=2, kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype)
    check(library, make_case([(40, 333), (129, 129)], shape))


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_tiles_whose_keys_are_shared(library: ctypes.CDLL, parts: int, window: int) -> None:
    check(library, make_case([(20, 700), (40, 150)], SHAPE.with_(window=window)), parts=parts)


@pytest.mark.parametrize("q_len", [31, 32, 33, 64, 65])
def test_lengths_around_a_tile(library: ctypes.CDLL, q_len: int) -> None:
    check(library, make_case([(q_len, q_len), (q_len, 128), (q_len, 2 * 128 + 1)], SHAPE))


@pytest.mark.parametrize("ctas", [1, 3, 20])
@pytest.mark.parametrize("window", [0, 30])
def test_short_tiles_one_after_the_other(library: ctypes.CDLL, window: int, ctas: int) -> None:
    lengths = [(20, 20), (9, 70), (31, 64), (8, 128), (6, 129), (30, 192), (5, 40)]
    check(library, make_case(lengths, SHAPE.with_(window=window)), ctas=ctas)


def test_no_tiles(library: ctypes.CDLL) -> None:
    check(library, make_case([(1, 77), (0, 0)], SHAPE))
