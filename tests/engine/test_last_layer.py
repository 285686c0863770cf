"""Behind its attention the last layer is computed of the sampled rows alone, where nobody asks for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mii.batching.data_classes import EngineRequest
from mii.engine import Engine
from mii.engine.graphs import Bucket, graph_bucket
from mii.modeling.mlp import ExpertsMLP
from mii.modeling.parameters import Linear
from tests.oracle import final_logits, generate, random_prompts, small_engine
from tests.variants import deepseek_v2

# One of each kind of block that narrows its last layer, and experts.
NARROWING = ("llama", "gemma2", "olmo2", "opt", "qwen3_moe", "gptj", "gpt_neox", "falcon", "phi", "deepseek_v2")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[int]]:
    """Makes an engine note how many rows its last layer's MLP gets in each step."""

    def watch(engine: Engine) -> list[int]:
        assert engine.runner is not None
        engine.runner._recorded.run = lambda key, body: body()  # type: ignore[method-assign]
        mlp, seen = engine.runner.model.blocks[-1].mlp, list[int]()
        first = mlp.router if isinstance(mlp, ExpertsMLP) else mlp.up  # type: ignore[attr-defined]

        def watched(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(linear: Linear, out: torch.Tensor, *rest: Any) -> torch.Tensor:
                if linear is first:
                    seen.append(out.shape[0])
                return real(linear, out, *rest)

            return call

        monkeypatch.setattr(Linear, "__call__", watched(Linear.__call__))
        monkeypatch.setattr(Linear, "gated", watched(Linear.gated))
        return seen

    return watch


@pytest.mark.parametrize("family", NARROWING)
def test_answers_are_those_of_all_rows(
    make_checkpoint: Callable[..., Path], rows: Callable[[Engine], list[int]], family: str
) -> None:
    engine = small_engine(make_checkpoint(family, **(deepseek_v2.SIZES if family == "deepseek_v2" else {})))
    assert engine.runner is not None
    prompts = random_prompts(engine.vocab_size, [40, 3, 17])
    seen = rows(engine)
    logits, answers = final_logits(engine, prompts[0]), generate(engine, prompts, 6)
    assert seen and set(seen) <= {1, 2, 3}  # a row for each sequence, of prompts too
    seen.clear()
    engine.runner.model.narrows = False
    engine.runner._forwards.clear()
    whole, same = final_logits(engine, prompts[0]), generate(engine, prompts, 6)
    assert max(seen) > 3
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert answers == same
    engine.destroy()


def test_a_block_whose_stream_is_normed_computes_all_rows(make_checkpoint: Callable[..., Path]) -> None:
    engine = small_engine(make_checkpoint("bloom", apply_residual_connection_post_layernorm=True))
    assert engine.runner is not None
    assert not engine.runner.model.narrows
    assert engine.runner._views(Bucket(24, 2), 2).tail is None
    engine.destroy()


def test_a_chunk_that_samples_nothing_ends_with_the_last_attention(
    tiny_llama: Path, rows: Callable[[Engine], list[int]]
) -> None:
    engine = small_engine(tiny_llama, max_tokens=16)
    prompt = random_prompts(engine.vocab_size, [50])
    seen = rows(engine)
    answers = generate(engine, prompt, 3)
    assert seen == [1, 1, 1]  # of four chunks only the last one samples
    engine.destroy()
    whole = small_engine(tiny_llama, max_tokens=64)
    assert generate(whole, prompt, 3) == answers
    whole.destroy()


def test_steps_that_score_prompts_compute_all_rows(tiny_llama: Path, rows: Callable[[Engine], list[int]]) -> None:
    engine = small_engine(tiny_llama)
    prompt = random_prompts(engine.vocab_size, [40])[0]
    seen = rows(engine)
    engine.add_request(EngineRequest(uid=0, prompt_ids=prompt, max_new_tokens=2, prompt_logprobs=1))
    while engine.has_work:
        engine.step()
    assert seen[:2] == [32, 8]  # a chunk of the prompt each
    seen.clear()
    engine.add_request(EngineRequest(uid=1, prompt_ids=prompt[::-1], max_new_tokens=2))
    while engine.has_work:
        engine.step()
    assert seen[0] == 1  # the first chunk has no row that is sampled
    engine.destroy()


def test_steps_of_which_most_rows_are_sampled_stay_whole() -> None:
    assert Bucket(128, 64).narrows
    assert not Bucket(127, 64).narrows
    assert not Bucket(64, 64, decodes=True).narrows
    assert not Bucket(8192, 64, whole=True).narrows
    assert graph_bucket(Bucket(700, 3, whole=True), 512, 8192) == graph_bucket(Bucket(700, 3), 512, 8192)._replace(
        whole=True
    )
