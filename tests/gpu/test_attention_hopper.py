"""The Hopper kernel of prompts, on the card: the edge grid, splits, graphs.

Other sizes of heads, other cards and steps without prompts go to the kernel that tests/gpu/test_attention.py tests.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu.test_attention import Static
from tests.ops.attention_cases import Shape, edge_lengths, make_case
from tests.ops.test_attention import LENGTHS, VARIANTS

CARD = Shape(dtype=torch.bfloat16, device="cuda", q_heads=8, kv_heads=2, head_dim=128, block_size=64)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the card is no Hopper")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernel_equals_reference(lengths: str, variant: str, head_dim: int, dtype: torch.dtype) -> None:
    shape = CARD.with_(dtype=dtype, head_dim=head_dim, **VARIANTS[variant])
    case = make_case(edge_lengths(64)[lengths], shape)
    case.check(case.run_native())


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_every_block(block_size: int, variant: str) -> None:
    case = make_case(edge_lengths(block_size)["mixed"], CARD.with_(block_size=block_size, **VARIANTS[variant]))
    case.check(case.run_native())


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (7, 7), (14, 2), (17, 1), (71, 1), (24, 8)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_any_ratio_of_heads(lengths: str, heads: tuple[int, int]) -> None:
    case = make_case(edge_lengths(64)[lengths], CARD.with_(q_heads=heads[0], kv_heads=heads[1]))
    case.check(case.run_native())


@pytest.mark.parametrize(
    "lengths",
    [
        [(length, length) for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)],
        [(32, 32 + context) for context in (0, 1, 63, 64, 65, 127, 128, 129, 500)],
        [(1500, 1500)],
        [(40, 9000)],
        [(40, 9000), (1, 9000), (300, 310), (1, 77)],
        [(700, 1700), *((1, 10 * kv) for kv in range(1, 100))],
        [(q, q) for q in range(1, 120)],
        [(4000, 4000), (300, 8000)],
    ],
    ids=lambda lengths: f"{len(lengths)} from {lengths[0]}",
)
@pytest.mark.parametrize("window", [0, 100, 333])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_and_many(head_dim: int, window: int, lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, CARD.with_(head_dim=head_dim, window=window))
    plan = case.plan()
    first = case.run_native(plan)
    case.check(first)
    for _ in range(5):
        assert torch.equal(case.run_native(plan), first), "the same batch gave other bits"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_captured_graph_serves_every_batch(head_dim: int) -> None:
    static = Static(CARD.with_(head_dim=head_dim), max_seqs=64, max_tokens=600, max_blocks=100, blocks=1200)
    static.load([(50, 50)], seed=0)
    static.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.step()
    batches = [*edge_lengths(64).values(), [(1, 6000)], [(30, 5000), (1, 4000)], [(500, 500)], [(1, 500)] * 60]
    for seed, lengths in enumerate(batches + batches[::-1]):
        case = static.load(lengths, seed)
        graph.replay()
        case.check(static.out)


def test_random_steps() -> None:
    random.seed(11)
    for turn in range(40):
        group, kv_heads = random.choice([1, 2, 3, 4, 5, 8, 12]), random.choice([1, 2, 3, 8])
        shape = CARD.with_(
            q_heads=group * kv_heads, kv_heads=kv_heads, head_dim=random.choice([64, 128]),
            block_size=random.choice([16, 32, 64, 128]), window=random.choice([0, 0, 5, 100, 1000]),
            dtype=random.choice([torch.bfloat16, torch.float16]), alibi=random.random() < 0.2,
            softcap=random.choice([0.0, 0.0, 0.0, 2.0]),
        )  # fmt: skip
        lengths = []
        for _ in range(random.randint(1, 30)):
            q_len = random.choice([0, 1, 1, 2, 4, random.randint(1, 300), random.randint(1, 900)])
            lengths.append((q_len, q_len + random.choice([0, 1, random.randint(0, 100), random.randint(0, 2500)])))
        case = make_case(lengths, shape, seed=turn)
        case.check(case.run_native())
