"""The attention kernel of all cards and that of its work list, run on the host: their device code against the stand-ins
of tests/ops/device.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from mii.ops import abi
from tests.ops.attention_cases import Case, Shape, edge_lengths, make_case, struct_of
from tests.ops.decode_attention_cases import CONTEXTS, DecodeCase, bits, make_decode_case
from tests.ops.device_library import device_library
from tests.ops.test_attention import VARIANTS

SHAPE = Shape(q_heads=4, kv_heads=2, head_dim=192, block_size=16, dtype=torch.bfloat16)
LENGTHS = edge_lengths(16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = device_library("attention_tiled", tmp_path_factory.mktemp("tiled"))
    loaded.attention_on_host.restype = loaded.decode_attention_on_host.restype = ctypes.c_char_p
    return loaded


def check(library: ctypes.CDLL, case: Case, *, ctas: int = 6, large: bool = True) -> None:
    out = case.new_out()
    failure = library.attention_on_host(ctypes.byref(struct_of(case, out)), ctas, large)
    assert failure is None, failure.decode()
    case.check(out)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_heads_of_192_of_every_length(library: ctypes.CDLL, lengths: str) -> None:
    check(library, make_case(LENGTHS[lengths], SHAPE))


@pytest.mark.parametrize("variant", ["window", "everything"])
def test_heads_of_192_with_what_models_add_to_scores(library: ctypes.CDLL, variant: str) -> None:
    check(library, make_case(LENGTHS["mixed"], SHAPE.with_(**VARIANTS[variant])))


@pytest.mark.parametrize("large", [True, False], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("head_dim", [80, 192])
def test_head_sizes_blocks_and_dtypes(library: ctypes.CDLL, head_dim: int, large: bool) -> None:
    shape = SHAPE.with_(head_dim=head_dim, block_size=64, dtype=torch.float16, q_heads=3, kv_heads=3)
    check(library, make_case([(1, 150), (40, 90), (1, 65), (17, 17)], shape), ctas=4, large=large)


@pytest.mark.parametrize("ctas", [1, 3, 16])
def test_keys_that_ctas_share(library: ctypes.CDLL, ctas: int) -> None:
    check(library, make_case([(1, 1500), (66, 700), (2, 300)], SHAPE.with_(kv_heads=1, q_heads=1)), ctas=ctas)


@pytest.mark.parametrize("ctas", [1, 3, 16])
@pytest.mark.parametrize(("head_dim", "q_heads", "q_len"), [(128, 8, 1), (80, 8, 1), (128, 16, 1), (128, 8, 3)])
def test_short_jobs_one_after_the_other(
    library: ctypes.CDLL, head_dim: int, q_heads: int, q_len: int, ctas: int
) -> None:
    """Jobs shorter than the ring of keys and longer ones."""
    lengths = [(min(q_len, length), length) for length in (1, 63, 64, 65, 130, 2, 300, 192, 193, 700, 5, 40, 257, 128)]
    check(library, make_case(lengths, SHAPE.with_(head_dim=head_dim, q_heads=q_heads, block_size=64)), ctas=ctas)


FEW, MANY, LONG = [(1, 200)] * 4, [(1, 200)] * 24, [(1, 700)] * 24


@pytest.mark.parametrize(
    ("lengths", "head_dim", "teams"),
    [(FEW, 128, 1), (MANY, 128, 4), (LONG, 128, 1), (MANY, 192, 1), ([*MANY, (40, 40)], 128, 1)],
    ids=["few", "many", "long", "large heads", "beside a prompt"],
)
def test_warps_do_many_short_jobs_alone(
    library: ctypes.CDLL, lengths: list[tuple[int, int]], head_dim: int, teams: int
) -> None:
    case = make_case(lengths, SHAPE.with_(head_dim=head_dim))
    assert library.teams_on_host(ctypes.byref(struct_of(case, case.new_out())), 3) == teams
    check(library, case, ctas=3)


@pytest.mark.parametrize("variant", ["window", "everything"])
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize(("q_heads", "large"), [(2, True), (8, True), (8, False)])
def test_jobs_of_warps_that_are_cut(
    library: ctypes.CDLL, q_heads: int, large: bool, head_dim: int, variant: str
) -> None:
    """Long ones among many short ones, and of several rows; heads of one row and of four."""
    lengths = [(1 + number % 2, 3 + 29 * number % 170) for number in range(40)]
    lengths[7], lengths[20], lengths[39] = (1, 1500), (2, 700), (1, 900)
    shape = SHAPE.with_(head_dim=head_dim, q_heads=q_heads, block_size=32, **VARIANTS[variant])
    case = make_case(lengths, shape)
    assert library.teams_on_host(ctypes.byref(struct_of(case, case.new_out())), 4) == 4
    check(library, case, ctas=4, large=large)


def test_jobs_of_few_and_of_many_rows_take_turns(library: ctypes.CDLL) -> None:
    lengths = [(1 + number % 4, 50 + 37 * number) for number in range(16)]
    check(library, make_case(lengths, SHAPE.with_(head_dim=128, q_heads=8, window=90)), ctas=2)


def run_decode(library: ctypes.CDLL, decode: DecodeCase, *, ctas: int, large: bool) -> torch.Tensor:
    out, table = decode.case.new_out(), decode.cos_sin
    args = abi.MiiDecodeAttention(
        struct_of(decode.case, out),
        None if table is None else table.data_ptr(),
        decode.positions.data_ptr(),
        decode.kv_slots.data_ptr(),
        0 if table is None else len(table),
    )
    failure = library.decode_attention_on_host(ctypes.byref(args), ctas, large)
    assert failure is None, failure.decode()
    return out


def rotated(decode: DecodeCase) -> Case:
    """The case with its tokens stored, rotated with one rounding less than torch has, as kernels do it."""
    stored, case = decode.stored(reference=True), decode.case
    if decode.cos_sin is None:
        return stored
    heads = case.qkv.unflatten(1, (-1, case.shape.head_dim)).float()
    x, y = heads.chunk(2, dim=-1)
    rows = decode.cos_sin[decode.positions.clamp(0, len(decode.cos_sin) - 1)][:, None]
    cos, sin = rows.chunk(2, dim=-1)
    first = (x.double() * cos.double() - (y * sin).double()).float()
    second = (y.double() * cos.double() + (x * sin).double()).float()
    turned = torch.cat((first, second), dim=-1).to(case.qkv.dtype)
    stored.q.copy_(turned[:, : case.shape.q_heads].flatten(1))
    kept, size = decode.kv_slots >= 0, case.shape.block_size
    block, offset = decode.kv_slots[kept] // size, decode.kv_slots[kept] % size
    stored.k_cache[block, :, offset] = turned[kept][:, case.shape.q_heads :][:, : case.shape.kv_heads]
    return stored


def check_decode(library: ctypes.CDLL, decode: DecodeCase, *, ctas: int = 6, large: bool = True) -> None:
    """As the kernel of stored tokens, to the bit, in what it computes and in what it leaves in the caches."""
    stored = rotated(decode)
    expected = stored.new_out()
    failure = library.attention_on_host(ctypes.byref(struct_of(stored, expected)), ctas, large)
    assert failure is None, failure.decode()
    stored.check(expected)
    qkv = decode.case.qkv.clone()
    out = run_decode(library, decode, ctas=ctas, large=large)
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(decode.case.k_cache), bits(stored.k_cache))
    assert torch.equal(bits(decode.case.v_cache), bits(stored.v_cache))
    assert torch.equal(decode.case.qkv, qkv)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize(("head_dim", "q_heads"), [(80, 2), (128, 8), (128, 32)])
def test_new_tokens_are_rotated_and_stored(
    library: ctypes.CDLL, head_dim: int, q_heads: int, window: int, rotates: bool
) -> None:
    shape = SHAPE.with_(head_dim=head_dim, q_heads=q_heads, window=window, block_size=16 if q_heads == 2 else 64)
    check_decode(library, make_decode_case(CONTEXTS, shape, rotates=rotates))


@pytest.mark.parametrize("large", [True, False], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_new_tokens_of_either_type_and_architecture(library: ctypes.CDLL, dtype: torch.dtype, large: bool) -> None:
    """Rows of angles apart from the positions, and past the table."""
    check_decode(
        library, make_decode_case([700, 3, 150], SHAPE.with_(head_dim=128, dtype=dtype), shift=30), large=large
    )


@pytest.mark.parametrize("ctas", [1, 3, 16])
def test_new_tokens_of_keys_that_ctas_share(library: ctypes.CDLL, ctas: int) -> None:
    check_decode(library, make_decode_case([1500, 1, 977], SHAPE.with_(head_dim=128, q_heads=2)), ctas=ctas)


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_new_tokens_of_warps_that_work_alone(library: ctypes.CDLL, head_dim: int, window: int) -> None:
    contexts = [3 + 29 * number % 170 for number in range(40)]
    contexts[7], contexts[20], contexts[39] = 1500, 700, 900
    decode = make_decode_case(contexts, SHAPE.with_(head_dim=head_dim, q_heads=8, block_size=32, window=window))
    assert library.teams_on_host(ctypes.byref(struct_of(decode.case, decode.case.new_out())), 4) == 4
    check_decode(library, decode, ctas=4)
