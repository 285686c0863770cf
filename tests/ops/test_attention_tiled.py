"""The attention kernel of all cards and that of its work list, run on the host: their device code against the stand-ins
of tests/ops/device.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.ops.attention_cases import Case, Shape, edge_lengths, make_case, struct_of
from tests.ops.device_library import device_library
from tests.ops.test_attention import VARIANTS

SHAPE = Shape(q_heads=4, kv_heads=2, head_dim=192, block_size=16, dtype=torch.bfloat16)
LENGTHS = edge_lengths(16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = device_library("attention_tiled", tmp_path_factory.mktemp("tiled"))
    loaded.attention_on_host.restype = ctypes.c_char_p
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
