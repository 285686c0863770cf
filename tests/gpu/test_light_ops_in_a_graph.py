"""The light operations of a step in one captured graph, where each kernel may start before the last one ends."""

from __future__ import annotations

import torch

from mii.ops import native
from mii.ops.activation import activation
from mii.ops.embedding import embedding
from mii.ops.gather import gather
from mii.ops.norm import norm
from mii.ops.prepare import StepTensors, prepare
from mii.ops.rope_kv import rope_kv
from tests.ops.kernel_checks import assert_close
from tests.ops.test_prepare import Case, allocate, fill

WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 512, 4, 2, 64, 6


class Model:
    """A chain of the operations without the matrix products, so that most edges are between two of our kernels."""

    def __init__(self, case: Case, step: StepTensors) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda").bfloat16()

        self.case, self.step = case, step
        self.table, self.weight = random(50000, WIDTH), random(WIDTH)
        self.cos_sin = torch.randn(600, HEAD_DIM, device="cuda")
        blocks = 2 * step.block_table.numel()
        self.k_cache, self.v_cache = (random(blocks, KV_HEADS, case.block_size, HEAD_DIM) for _ in "kv")
        self.residual, self.hidden = random(case.max_tokens, WIDTH), random(case.max_tokens, WIDTH)
        self.gated, self.copied = (random(case.max_tokens, WIDTH // 2) for _ in range(2))
        self.rows = random(case.max_seqs, WIDTH)

    def __call__(self) -> None:
        prepare(self.step, self.case.block_size)
        embedding(self.residual, self.table, self.step.ids)
        norm(self.hidden, self.residual, self.weight, eps=1e-5)
        for _ in range(LAYERS):
            rope_kv(
                self.hidden, self.k_cache, self.v_cache, self.cos_sin, self.step.positions, self.step.kv_slots,
                q_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM,
            )  # fmt: skip
            norm(self.hidden, self.hidden, self.weight, eps=1e-5, residual=self.residual)
            self.hidden.neg_()  # a kernel of another library between two of ours, then a copy
            activation(self.gated, self.hidden, "silu", gated=True)
            self.copied.copy_(self.gated)
            activation(self.hidden[:, : WIDTH // 2], self.copied, "gelu_tanh", gated=False)
        gather(self.rows, self.hidden, self.step.sample_rows)


def test_replays_equal_the_reference_run() -> None:
    cases = [Case(32, 256, lengths) for lengths in ((200, 1, 1), (1,) * 32, (), (100, 100, 50))]
    step = allocate(cases[0], "cuda")
    model = Model(cases[0], step)
    model()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model()
    for seed, case in enumerate(cases * 5):
        fill(case, step, seed)
        step.upload()
        graph.replay()
        mine = model.rows.clone(), model.k_cache.clone()
        with native.reference_ops():
            model()
        assert_close(mine[0], model.rows, ulps=8)
        assert_close(mine[1], model.k_cache, ulps=8)
