"""Products that add their results to the residual stream themselves give transformers' logits and greedy tokens too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from mii.modeling import parameters
from mii.ops import linear
from tests.oracle import final_logits, generate, random_prompts, small_engine, tolerance
from tests.variants import Variant, all_variants

LENGTHS = [1, 5, 17, 40, 100]  # with steps on either side of the rows from which products add
ADDING = {
    *("Llama-heads_of_64", "OPT-no_biases", "Falcon-7B:_one_key_head,_parallel", "Falcon-40B:_groups,_two_norms"),
    "Mixtral-8_experts,_2_each",  # attention alone
    "DeepSeek-V2-as_V2-Lite,_YaRN",  # and the MLP of the first layer
}
NOT_ADDING = {
    *("GPT-2-plain", "Gemma_2-soft_caps", "OLMo-2-norms_over_all_heads", "OPT-post-norm", "Bloom-normed_residual"),
}


def chosen(names: set[str]) -> list[Variant]:
    return [variant for variant in all_variants() if str(variant) in names]


def unpacked(weight: torch.Tensor) -> linear.LinearWeight:
    return linear.LinearWeight(weight, *weight.shape, weight.dtype, packed=False)


@pytest.fixture
def forced() -> Iterator[mock.Mock]:
    """torch multiplies, and adds from 8 rows on; what is called then."""
    with (
        mock.patch.object(parameters, "pack_linear", unpacked),
        mock.patch.object(linear, "ADDED_ROWS", 8),
        mock.patch.object(parameters, "add_linear", wraps=linear.add_linear) as add,
    ):
        yield add


@pytest.mark.parametrize("variant", chosen(ADDING | NOT_ADDING), ids=str)
def test_logits_and_greedy_tokens_equal_transformers(variant: Variant, forced: mock.Mock, tmp_path: Path) -> None:
    folder = variant.make(tmp_path)
    oracle, engine = variant.oracle(folder), small_engine(folder)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    for prompt, answer in zip(prompts, generate(engine, prompts, 16), strict=True):
        assert oracle.logits_along(prompt, answer).argmax(1).tolist() == answer
    for prompt in prompts:
        expected = oracle.logits(prompt)
        assert (final_logits(engine, prompt) - expected).abs().max() <= tolerance(expected, "fp32")
    engine.destroy()
    assert bool(forced.call_count) == (str(variant) in ADDING)


def test_products_of_packed_weights_and_of_few_rows_do_not_add(forced: mock.Mock) -> None:
    weight = torch.ones(4, 8)
    assert linear.adds(unpacked(weight), 8)
    assert not linear.adds(unpacked(weight), 7)
    assert not linear.adds(linear.LinearWeight(weight, 4, 8, weight.dtype, packed=True), 8)


def test_an_added_product_of_wrong_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        linear.add_linear(torch.ones(2, 5), torch.ones(2, 8), unpacked(torch.ones(4, 8)))
