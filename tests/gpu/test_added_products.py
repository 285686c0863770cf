"""Products that add their results to the residual stream themselves, on a card."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from mii.modeling import parameters
from mii.ops import linear
from tests.modeling.test_added_products import ADDING, chosen
from tests.oracle import assert_greedy_but_for_ties, final_logits, generate, random_prompts, small_engine, tolerance
from tests.variants import Variant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 130, 2048])
def test_a_product_adds_in_place_and_rounds_once(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    wide = torch.randn(rows, 1024 + 64, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(512, 1024, generator=generator, device="cuda").mul_(1 / 32).to(dtype)
    out = torch.randn(rows, 512, generator=generator, device="cuda").to(dtype)
    x, address = wide[:, :1024], out.data_ptr()
    expected = out.double() + x.double() @ weight.double().t()
    linear.add_linear(out, x, linear.pack_linear(weight))
    assert out.data_ptr() == address
    assert (out.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", chosen(ADDING), ids=str)
def test_logits_and_greedy_tokens_equal_transformers(variant: Variant, dtype: str, tmp_path: Path) -> None:
    folder = variant.make(tmp_path, dtype)
    oracle = variant.oracle(folder, variant.exact_dtype or dtype, "cuda")
    with (
        mock.patch.object(linear, "ADDED_ROWS", 8),
        mock.patch.object(parameters, "add_linear", wraps=linear.add_linear) as add,
    ):
        engine = small_engine(folder, device="cuda", dtype=dtype, block_size=64)
        prompts = random_prompts(engine.vocab_size, [1, 5, 17, 40, 100])
        for _ in range(3):  # eager, captured, replayed
            for prompt, answer in zip(prompts, generate(engine, prompts, 16), strict=True):
                assert_greedy_but_for_ties(oracle, prompt, answer, dtype)
        for prompt in prompts:
            expected = oracle.logits(prompt)
            exact = expected if oracle.exact is None else oracle.exact.logits(prompt)
            assert (final_logits(engine, prompt) - expected).abs().max() <= tolerance(expected, dtype, exact)
        engine.destroy()
    assert add.call_count
