"""Decode attention on the card: bit for bit what the rotation's kernel and attention's give one after the other.

So are the caches that it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mii.modeling.attention import Attention
from mii.ops import decode_attention as module
from mii.ops import native
from mii.ops.attention import AttentionPlan, attention
from mii.ops.decode_attention import decode_attention
from mii.ops.linear import linear, pack_linear
from mii.ops.rope_kv import rope_kv
from tests.gpu.test_engine import LENGTHS, card_engine
from tests.ops.attention_cases import Shape
from tests.ops.decode_attention_cases import CONTEXTS, DecodeCase, bits, make_decode_case
from tests.oracle import generate, random_prompts

CARD = Shape(q_heads=8, kv_heads=2, head_dim=128, block_size=64, dtype=torch.bfloat16, device="cuda")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where there is no kernel for all of it."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("no kernel for decode attention")

    monkeypatch.setattr(module, "rope_kv", fail)


def check(decode: DecodeCase, plan: AttentionPlan | None = None) -> None:
    plan = plan or decode.case.plan()
    stored, qkv = decode.stored(), decode.case.qkv.clone()
    expected = stored.run_native(plan)
    stored.check(expected)
    out = decode.run(plan)
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(decode.case.k_cache), bits(stored.k_cache))
    assert torch.equal(bits(decode.case.v_cache), bits(stored.v_cache))
    assert torch.equal(decode.case.qkv, qkv)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_lengths_around_every_border(head_dim: int, dtype: torch.dtype, window: int, rotates: bool) -> None:
    for block_size in (16, 32, 64, 128):
        shape = CARD.with_(head_dim=head_dim, dtype=dtype, window=window, block_size=block_size)
        check(make_decode_case(CONTEXTS, shape, rotates=rotates, shift=block_size))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (7, 7), (14, 2), (16, 1), (24, 8), (32, 8)], ids=str)
def test_any_ratio_of_heads(heads: tuple[int, int]) -> None:
    check(make_decode_case(CONTEXTS, CARD.with_(q_heads=heads[0], kv_heads=heads[1])))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("window", [0, 333])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "contexts",
    [
        [1],
        [20000],
        [20000, 3, 5000],
        [264] * 64,
        list(range(1, 300)),
        [2 + 37 * number % 400 if number % 300 else 3000 for number in range(1200)],
    ],
    ids=lambda contexts: f"{len(contexts)} from {contexts[0]}",
)
def test_long_and_many(contexts: list[int], head_dim: int, window: int) -> None:
    """Keys that CTAs share, and jobs that warps do alone; twice, as counters have to be zero again."""
    shape = CARD.with_(head_dim=head_dim, window=window)
    decode = make_decode_case(contexts, shape)
    plan = decode.case.plan()
    check(decode, plan)
    check(make_decode_case(contexts, shape, seed=1), plan)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 256}, {"q_heads": 71, "kv_heads": 1}, {"softcap": 3.0}, {"alibi": True}]
)
def test_what_no_kernel_takes_is_done_by_two(changes: dict[str, Any]) -> None:
    decode = make_decode_case(CONTEXTS, CARD.with_(**changes))
    stored = decode.stored()
    stored.check(decode.run())
    assert torch.equal(bits(decode.case.k_cache), bits(stored.k_cache))


class Steps:
    """Layers of product, attention and product over growing contexts, where each kernel may start before the last ends.

    The steps of the two ways begin alike.
    """

    HIDDEN, LAYERS, BLOCKS = 1024, 3, 8

    def __init__(self, contexts: list[int]) -> None:
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).bfloat16().cuda()

        generator = torch.Generator().manual_seed(1)
        self.decode = make_decode_case(
            contexts, CARD, max_blocks=self.BLOCKS, max_seqs=len(contexts), max_tokens=len(contexts)
        )
        rows, width = len(contexts), CARD.q_heads * CARD.head_dim
        table = self.decode.case.batch.block_table
        table.copy_(torch.randperm(table.numel(), generator=generator).view_as(table))
        self.x, self.out = random(rows, self.HIDDEN), random(rows, width)
        shape = (table.numel(), CARD.kv_heads, CARD.block_size, CARD.head_dim)
        self.caches = [(random(*shape), random(*shape)) for _ in range(self.LAYERS)]
        qkv = self.decode.case.qkv.shape[1]
        scale = self.HIDDEN**-0.5
        self.weights = [
            (pack_linear(random(qkv, self.HIDDEN, scale=scale)), pack_linear(random(self.HIDDEN, width, scale=scale)))
            for _ in range(self.LAYERS)
        ]
        self.plan = self.decode.case.plan()

    def step(self, apart: bool) -> None:
        decode, case, batch = self.decode, self.decode.case, self.decode.case.batch
        batch.kv_len.add_(1)
        decode.positions.add_(1)
        index = (decode.positions // CARD.block_size).long()[:, None]
        block = batch.block_table[batch.seq_slot.long()].gather(1, index)[:, 0]
        decode.kv_slots.copy_(block * CARD.block_size + decode.positions % CARD.block_size)
        self.plan.update(batch)
        tokens = (decode.cos_sin, decode.positions, decode.kv_slots)
        heads = {"q_heads": CARD.q_heads, "kv_heads": CARD.kv_heads, "head_dim": CARD.head_dim}
        for (up, down), caches in zip(self.weights, self.caches, strict=True):
            linear(case.qkv, self.x, up)
            if apart:
                rope_kv(case.qkv, *caches, *tokens, **heads, rotary_dim=CARD.head_dim)
                attention(self.out, case.q, *caches, batch, self.plan, scale=case.scale)
            else:
                decode_attention(self.out, case.qkv, *caches, *tokens, batch, self.plan, scale=case.scale)
            linear(self.x, self.out, down)

    def run(self, apart: bool, steps: int) -> list[torch.Tensor]:
        """The stream after each step, and the caches after the last; all steps but the first by a graph."""
        self.step(apart)
        streams = [self.x.clone()]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.step(apart)
        for _ in range(steps - 1):
            graph.replay()
            streams.append(self.x.clone())
        return [*streams, *(cache for pair in self.caches for cache in pair)]


@pytest.mark.parametrize(
    "contexts", [[1], [200, 3, 1, 60, 64, 63, 15, 16], [1 + 7 * n % 270 for n in range(64)]], ids=len
)
def test_captured_steps_over_growing_contexts(contexts: list[int]) -> None:
    results = [Steps(contexts).run(apart, steps=100) for apart in (True, False)]
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other), f"number {number} differs"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_engine_gives_the_same_tokens(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    """With prompts that begin alike, so that blocks are shared and steps of one token each begin on them."""
    folder = make_checkpoint(head_dim=head_dim, num_attention_heads=4, num_key_value_heads=2)
    first = card_engine(folder, "bf16", max_tokens=128, max_sequences=64)
    prompts = random_prompts(first.vocab_size, [*LENGTHS, 65, 129])
    prompts += [prompts[-1], prompts[-2], *([prompt[0]] for prompt in prompts)]
    called: list[int] = []
    real = native.Library.call

    def watched(library: native.Library, name: str, args: Any, stream: int = 0) -> bool:
        called.append(name == "mii_decode_attention")
        return real(library, name, args, stream)

    with monkeypatch.context() as patch:
        patch.setattr(native.Library, "call", watched)
        patch.setattr("mii.engine.loading.CAPTURE_SECONDS", -1.0)
        answers = [generate(first, prompts, 100) for _ in range(3)]
        launched = card_engine(folder, "bf16", max_tokens=128, max_sequences=64)
        assert generate(launched, prompts, 100) == answers[0]
        assert any(called)
    first.destroy()
    launched.destroy()
    monkeypatch.setattr(Attention, "_rotates_plainly", lambda self: False)
    apart = card_engine(folder, "bf16", max_tokens=128, max_sequences=64)
    assert [generate(apart, prompts, 100) for _ in range(3)] == answers
    apart.destroy()
