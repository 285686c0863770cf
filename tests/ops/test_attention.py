"""Attention over the paged cache: the plain torch body against the textbook formula, the CPU library against it."""

from __future__ import annotations

import pytest
import torch

from mii.ops import native
from mii.ops.attention import AttentionPlan, attention
from tests.ops.attention_cases import Case, Shape, edge_lengths, make_case

LENGTHS = list(edge_lengths(16))
VARIANTS = {
    "plain": {},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "everything": {"window": 37, "softcap": 2.0, "alibi": True},
}


def dense(case: Case) -> torch.Tensor:
    """The formula in float64, sequence by sequence, from keys and values gathered token by token."""
    shape, batch = case.shape, case.batch
    out = case.new_out().double().unflatten(1, (shape.q_heads, shape.head_dim))
    for s, (q_len, kv_len) in enumerate(case.lengths):
        if not q_len:
            continue
        start = int(batch.q_start[s])
        table = batch.block_table[batch.seq_slot[s]].tolist()
        tokens = [(table[t // shape.block_size], t % shape.block_size) for t in range(kv_len)]
        k, v = (torch.stack([c[b, :, o] for b, o in tokens]).nan_to_num() for c in (case.k_cache, case.v_cache))
        group = shape.q_heads // shape.kv_heads
        k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        q = case.q[start : start + q_len].double().unflatten(1, (shape.q_heads, -1)).transpose(0, 1)
        distance = torch.arange(kv_len) - torch.arange(kv_len - q_len, kv_len)[:, None]
        score = q @ k.transpose(1, 2) * case.scale
        if shape.softcap:
            score = shape.softcap * torch.tanh(score / shape.softcap)
        if case.alibi_slopes is not None:
            score += case.alibi_slopes.double()[:, None, None] * distance
        seen = distance <= 0
        if shape.window:
            seen &= distance > -shape.window
        out[start : start + q_len] = (score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out.flatten(1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_reference_is_the_formula(lengths: str, variant: str) -> None:
    case = make_case(edge_lengths(16)[lengths], Shape(**VARIANTS[variant]))
    torch.testing.assert_close(case.reference().double(), dense(case), atol=2e-6, rtol=2e-6)


def test_reference_is_torchs_causal_attention() -> None:
    case = make_case([(300, 300)], Shape(q_heads=3, kv_heads=3))
    table = case.batch.block_table[case.batch.seq_slot[0]][:19].long()
    k, v = (c[table].transpose(1, 2).flatten(0, 1)[:300].transpose(0, 1) for c in (case.k_cache, case.v_cache))
    q = case.q[:300].unflatten(1, (3, 64)).transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(case.reference()[:300], expected.transpose(0, 1).flatten(1), atol=2e-6, rtol=2e-6)


@pytest.fixture
def cpu_library() -> native.Library:
    library = native.library(torch.device("cpu"))
    if library is None or not library.has("mii_attention"):
        pytest.skip("libmii_cpu.so is not built: python setup.py build_native")
    return library


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cpu_library_matches_the_reference(lengths: str, variant: str, dtype: torch.dtype) -> None:
    case = make_case(edge_lengths(16)[lengths], Shape(dtype=dtype, **VARIANTS[variant]))
    case.check(case.run_native())


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (7, 7), (14, 2), (8, 1), (71, 1)], ids=str)
def test_cpu_library_takes_any_heads_and_block(heads: tuple[int, int], block_size: int) -> None:
    shape = Shape(q_heads=heads[0], kv_heads=heads[1], block_size=block_size, dtype=torch.bfloat16)
    case = make_case(edge_lengths(block_size)["mixed"], shape)
    case.check(case.run_native())


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_cpu_library_takes_every_head_size(head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(edge_lengths(32)["mixed"], Shape(head_dim=head_dim, block_size=32, dtype=dtype))
        case.check(case.run_native())


@pytest.mark.usefixtures("cpu_library")
def test_a_plan_serves_batch_after_batch() -> None:
    shape = Shape(dtype=torch.bfloat16)
    cases = [
        make_case(lengths, shape, seed=i, max_seqs=12, max_tokens=400, max_blocks=60)
        for i, lengths in enumerate(edge_lengths(16).values())
    ]
    plan = cases[0].plan()
    for case in cases + cases[::-1]:
        case.check(case.run_native(plan))


def test_reference_ops_switch_the_library_off() -> None:
    case = make_case(edge_lengths(16)["mixed"], Shape())
    plan, out = case.plan(), case.new_out()
    with native.reference_ops():
        plan.update(case.batch)
        attention(out, case.q, case.k_cache, case.v_cache, case.batch, plan, **case.options())  # type: ignore[arg-type]
    assert torch.equal(out, case.reference())


def test_rows_of_three_dimensions_are_the_same_rows() -> None:
    case = make_case([(3, 20)], Shape())
    plan, out = case.plan(), case.new_out()
    plan.update(case.batch)
    heads = (case.shape.q_heads, case.shape.head_dim)
    caches = case.k_cache, case.v_cache
    attention(out.unflatten(1, heads), case.q.unflatten(1, heads), *caches, case.batch, plan, scale=case.scale)
    case.check(out)


class TestRefusals:
    def plan(self, **changes: object) -> AttentionPlan:
        arguments = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "block_size": 16, "max_seqs": 8, "max_tokens": 64}
        others = {"max_blocks": 4, "dtype": torch.float32, "device": "cpu", **changes}
        return AttentionPlan(**(arguments | others))  # type: ignore[arg-type]

    def test_heads_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads"):
            self.plan(q_heads=5)

    def test_block_size(self) -> None:
        with pytest.raises(ValueError, match="48 tokens is not supported: give 16, 32, 64 or 128"):
            self.plan(block_size=48)

    def test_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"torch\.float64 is not supported"):
            self.plan(dtype=torch.float64)

    def test_a_batch_beyond_the_plans_bounds(self) -> None:
        with pytest.raises(ValueError, match="100 tokens, the attention plan was made for 8 and 64"):
            self.plan().update(make_case([(1, 1)], Shape(), max_seqs=8, max_tokens=100).batch)

    def test_a_batch_that_was_not_planned(self) -> None:
        case = make_case([(1, 1)], Shape())
        with pytest.raises(ValueError, match=r"call plan\.update\(batch\)"):
            attention(case.new_out(), case.q, case.k_cache, case.v_cache, case.batch, case.plan(), scale=1.0)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("q", lambda t: t[:, :-1], "4 heads x 64 elements"),
            ("out", lambda t: t.bfloat16(), r"must all be torch\.float32"),
            ("k_cache", lambda t: t[:, :1], "contiguous tensor"),
            ("v_cache", lambda t: t.transpose(1, 2), "contiguous tensor"),
            ("alibi_slopes", lambda _: torch.ones(3), "4 float32 values"),
        ],
    )
    def test_tensors_that_do_not_fit(self, name: str, change: object, message: str) -> None:
        case = make_case([(1, 1)], Shape())
        plan = case.plan()
        plan.update(case.batch)
        tensors = {"out": case.new_out(), "q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
        tensors[name] = change(tensors.get(name))  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            attention(batch=case.batch, plan=plan, scale=1.0, **tensors)  # type: ignore[arg-type]
