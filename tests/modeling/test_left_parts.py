"""Products that the norm behind them adds up: every block takes them where they are, and nowhere else.

No product leaves parts on a CPU, so these tests have every product that may leave some do so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mii.modeling import mlp
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
