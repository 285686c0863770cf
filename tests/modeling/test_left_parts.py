"""Products that the norm behind them adds up: every block takes them where they are, and nowhere else.

No product leaves parts on a CPU, so these tests have every product that may leave some do so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mii.batching.scheduler import Plan
from mii.engine.graphs import Bucket, graph_bucket
from mii.engine.runner import Runner
from mii.modeling import mlp
from mii.modeling.experts import ExpertBuffers
from mii.modeling.parameters import Linear
from mii.ops.summands import Summands
from tests.oracle import generate, random_prompts, small_engine


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what products left; the place of the product itself then holds nothing."""
    shapes: list[tuple[int, ...]] = []

    def to_norm(self: Linear, out: torch.Tensor, x: torch.Tensor, summands: torch.Tensor) -> Summands:
        assert summands.dtype == torch.float32
        whole = self(out, x).float()
        shapes.append(tuple(whole.shape))
        parts = Summands(torch.stack([0.25 * whole, 0.75 * whole]), out.dtype)
        out.fill_(torch.nan)
        return parts

    monkeypatch.setattr(Linear, "to_norm", to_norm)
    monkeypatch.setattr(mlp, "adds_parts", lambda device: True)  # a token's experts are left, too
    return shapes


@pytest.mark.parametrize(
    ("model_type", "leaves"),
    [
        ("llama", True),  # attention's output and the MLP's
        ("gpt_neox", True),  # one product of both
        ("mixtral", True),  # attention's, and a token's experts
        ("qwen2_moe", True),  # attention's: experts with a shared one are added up before
        ("gemma2", False),  # a branch that is normed before it is added
        ("olmo2", False),
    ],
)
def test_answers_are_those_of_whole_products(
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    left: list[tuple[int, ...]],
    model_type: str,
    leaves: bool,
) -> None:
    folder, answers = make_checkpoint(model_type), []
    for _ in range(2):
        engine = small_engine(folder)
        prompts = random_prompts(engine.vocab_size, [3, 40, 17])
        answers.append(generate(engine, prompts, 12))
        engine.destroy()
        monkeypatch.undo()  # the second time as it is
    assert answers[0] == answers[1]
    assert bool(left) == leaves


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_what_padding_leaves_changes_nothing(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Rows that fill a step up to the size of its graph go through all layers, with whatever the experts left there."""
    folder, answers = make_checkpoint(model_type), []
    real_bucket, real_multiply, padding = Runner._bucket, mlp.ExpertsMLP._multiply, []

    def padded(self: Runner, plan: Plan) -> Bucket:
        bucket = graph_bucket(real_bucket(self, plan), self.limits.max_sequences, self.limits.max_tokens)
        padding.append(bucket.tokens - plan.num_tokens)
        return bucket

    def poisoned(self: mlp.ExpertsMLP, buffers: ExpertBuffers, x: torch.Tensor) -> torch.Tensor:
        buffers.parts.fill_(torch.nan)
        return real_multiply(self, buffers, x)

    for _ in range(2):
        engine = small_engine(folder)
        prompts = random_prompts(engine.vocab_size, [3, 40, 17])
        answers.append(generate(engine, prompts, 12))
        engine.destroy()
        monkeypatch.setattr(Runner, "_bucket", padded)
        monkeypatch.setattr(mlp.ExpertsMLP, "_multiply", poisoned)
    assert answers[0] == answers[1]
    assert any(padding)
