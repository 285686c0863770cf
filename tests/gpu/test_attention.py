"""Attention on the card: the grid of tests/ops/test_attention.py, mixed steps, splits, graphs that outlive lengths."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from mii.ops.attention import AttentionBatch
from tests.ops.attention_cases import Case, Shape, edge_lengths, make_case
from tests.ops.test_attention import LENGTHS, VARIANTS

CARD = Shape(dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernel_equals_reference(lengths: str, variant: str, dtype: torch.dtype) -> None:
    case = make_case(edge_lengths(16)[lengths], CARD.with_(dtype=dtype, **VARIANTS[variant]))
    case.check(case.run_native())


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size_and_block(head_dim: int, block_size: int, variant: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        shape = CARD.with_(head_dim=head_dim, block_size=block_size, dtype=dtype, **VARIANTS[variant])
        case = make_case(edge_lengths(block_size)["mixed"], shape)
        case.check(case.run_native())


@pytest.mark.parametrize("head_dim", [8, 48, 100, 160, 300])
def test_other_head_sizes(head_dim: int) -> None:
    case = make_case(edge_lengths(16)["mixed"], CARD.with_(head_dim=head_dim))
    case.check(case.run_native())


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (7, 7), (14, 2), (16, 1), (17, 1), (71, 1), (24, 8)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_any_ratio_of_heads(lengths: str, heads: tuple[int, int]) -> None:
    shape = CARD.with_(q_heads=heads[0], kv_heads=heads[1], head_dim=128, block_size=32)
    case = make_case(edge_lengths(32)[lengths], shape)
    case.check(case.run_native())


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 20000)],
        [(1, 20000), (1, 3), (1, 5000)],
        [(1, kv) for kv in range(1, 300)],
        [(3, 9000), (2, 100)],
        [(1500, 1500)],
        [(40, 9000)],
        [(40, 9000), (1, 9000), (300, 310), (1, 77)],
        [(700, 1700), *((1, 10 * kv) for kv in range(1, 100))],
        [(q, q) for q in range(1, 120)],
    ],
    ids=lambda lengths: f"{len(lengths)} from {lengths[0]}",
)
@pytest.mark.parametrize("window", [0, 333])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_long_and_many(head_dim: int, window: int, lengths: list[tuple[int, int]]) -> None:
    shape = CARD.with_(q_heads=8, kv_heads=2, head_dim=head_dim, block_size=64, window=window)
    case = make_case(lengths, shape)
    plan = case.plan()
    first = case.run_native(plan)
    case.check(first)
    assert torch.equal(case.run_native(plan), first), "the same batch gave other bits"


@pytest.mark.parametrize("variant", ["plain", "window", "everything"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_so_many_short_jobs_that_warps_do_them_alone(head_dim: int, variant: str) -> None:
    """One in a while is long, and cut."""
    lengths = [(1 + number % 2, 2 + 37 * number % 400) for number in range(1200)]
    lengths[::300] = [(1, 3000)] * 4
    shape = CARD.with_(q_heads=8, kv_heads=2, head_dim=head_dim, block_size=64, **VARIANTS[variant])
    case = make_case(lengths, shape, max_seqs=2048, max_tokens=4096)
    plan = case.plan()
    first = case.run_native(plan)
    case.check(first)
    assert torch.equal(case.run_native(plan), first), "the same batch gave other bits"


def test_as_many_sequences_and_tokens_as_a_step_may_have() -> None:
    random.seed(1)
    lengths = [(1, random.randint(1, 60)) for _ in range(2000)] + [(q, q + 20) for q in (3000, 9000, 1, 40, 700)]
    shape = CARD.with_(q_heads=4, kv_heads=2, block_size=32)
    case = make_case(lengths, shape, max_seqs=2048, max_tokens=16384)
    case.check(case.run_native())


def test_rows_that_are_not_aligned() -> None:
    case = make_case(edge_lengths(16)["mixed"], CARD)
    shifted = torch.zeros(case.q.shape[0], case.q.shape[1] + 3, dtype=case.q.dtype, device="cuda")
    case.q = shifted[:, 3:].copy_(case.q)
    case.check(case.run_native())


class Static:
    """Tensors of fixed address that take one case after another, as a captured step has them."""

    def __init__(self, shape: Shape, max_seqs: int, max_tokens: int, max_blocks: int, blocks: int) -> None:
        self.bounds = {"max_seqs": max_seqs, "max_tokens": max_tokens, "max_blocks": max_blocks}
        self.shape = shape
        self.case = make_case([(1, 1)], shape, **self.bounds)
        cache = (blocks, *self.case.k_cache.shape[1:])
        self.case.k_cache, self.case.v_cache = (torch.zeros(cache, dtype=shape.dtype, device="cuda") for _ in "kv")
        self.case.q = self.case.q.clone()
        self.plan = self.case.plan()
        self.out = self.case.new_out()

    def step(self, layers: int = 3) -> None:
        self.plan.update(self.case.batch)
        for _ in range(layers):
            case = self.case
            assert self.plan.run(self.out, case.q, case.k_cache, case.v_cache, None, case.scale, 0.0)

    def load(self, lengths: list[tuple[int, int]], seed: int) -> Case:
        case = make_case(lengths, self.shape, seed=seed, **self.bounds)
        for field in dataclasses.fields(AttentionBatch):
            source = getattr(case.batch, field.name)
            if isinstance(source, torch.Tensor):
                getattr(self.case.batch, field.name).copy_(source)
        for ours, theirs in ((self.case.k_cache, case.k_cache), (self.case.v_cache, case.v_cache)):
            ours.fill_(torch.nan)[: theirs.shape[0]].copy_(theirs)
        self.case.q.copy_(case.q)
        self.out.copy_(case.new_out())
        return case


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_captured_graph_serves_every_batch(head_dim: int) -> None:
    shape = CARD.with_(q_heads=8, kv_heads=2, head_dim=head_dim, block_size=32)
    static = Static(shape, max_seqs=64, max_tokens=600, max_blocks=200, blocks=1200)
    static.load([(5, 5)], seed=0)
    static.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.step()
    batches = [*edge_lengths(32).values(), [(1, 6000)], [(30, 5000), (1, 4000)], [(500, 500)], [(1, 500)] * 60]
    for seed, lengths in enumerate(batches + batches[::-1]):
        case = static.load(lengths, seed)
        graph.replay()
        case.check(static.out)


def test_one_plan_serves_buckets_of_every_size() -> None:
    shape = CARD.with_(q_heads=8, kv_heads=2, head_dim=128, block_size=64)
    large = make_case([(1, 1)], shape, max_seqs=256, max_tokens=2048, max_blocks=200)
    plan = large.plan()
    for turn in range(3):
        for max_seqs, lengths in ((3, [(1, 9000)]), (200, [(1, 700)] * 190), (8, [(90, 8000), (1, 400)])):
            case = make_case(lengths, shape, seed=turn, max_seqs=max_seqs, max_blocks=200)
            case.check(case.run_native(plan))


def test_random_steps() -> None:
    random.seed(7)
    for turn in range(30):
        group, kv_heads = random.choice([1, 2, 3, 4, 5, 8, 12]), random.choice([1, 2, 3, 8])
        shape = CARD.with_(
            q_heads=group * kv_heads, kv_heads=kv_heads, head_dim=random.choice([64, 80, 96, 128, 192, 256]),
            block_size=random.choice([16, 32, 64, 128]), window=random.choice([0, 0, 5, 100, 1000]),
            dtype=random.choice([torch.bfloat16, torch.float16]), alibi=random.random() < 0.2,
            softcap=random.choice([0.0, 0.0, 0.0, 2.0]),
        )  # fmt: skip
        lengths = []
        for _ in range(random.randint(1, 40)):
            q_len = random.choice([0, 1, 1, 1, 1, 2, 4, random.randint(1, 300)])
            lengths.append((q_len, q_len + random.choice([0, 1, random.randint(0, 100), random.randint(0, 2500)])))
        case = make_case(lengths, shape, seed=turn)
        case.check(case.run_native())
