"""Every family on a card, with each of its options: transformers' logits and greedy tokens, with and without graphs.

Where two tokens' logits are closer than the tolerance, greedy decoding may choose either; after such a choice the
comparison goes on with the token that was chosen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families_table import FamiliesTable
from tests.oracle import (
    DTYPES,
    assert_greedy_but_for_ties,
    final_logits,
    generate,
    random_prompts,
    small_engine,
    tolerance,
)
from tests.variants import Variant, all_variants

LENGTHS = [1, 5, 16, 17, 40, 33, 100]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", all_variants(), ids=str)
def test_logits_and_greedy_tokens_equal_transformers(
    variant: Variant, dtype: str, tmp_path: Path, families_table: FamiliesTable
) -> None:
    folder = variant.make(tmp_path, dtype)
    oracle = variant.oracle(folder, variant.exact_dtype or dtype, "cuda")
    engine = small_engine(folder, device="cuda", dtype=dtype, block_size=64)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    for _ in range(3):  # eager, captured, replayed
        for prompt, answer in zip(prompts, generate(engine, prompts, 64), strict=True):
            assert_greedy_but_for_ties(oracle, prompt, answer, dtype)
    worst = 0.0
    for prompt in prompts:
        expected = oracle.logits(prompt)
        error = (final_logits(engine, prompt) - expected).abs().max()
        exact = expected if oracle.exact is None else oracle.exact.logits(prompt)
        assert error <= tolerance(expected, dtype, exact)
        worst = max(worst, float(error / expected.abs().max()))
    figure = f"{worst:.1e}" if dtype == "fp32" else f"{worst / torch.finfo(DTYPES[dtype]).eps:.1f} ulp"
    families_table.record(variant.family, variant.option, f"{dtype} on a GPU", figure)
    engine.destroy()
