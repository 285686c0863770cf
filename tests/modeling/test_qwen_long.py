"""Qwen 1 past the length that it was trained on, against the equations of its published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.modeling.test_families import assert_greedy
from tests.oracle import generate, random_prompts, small_engine
from tests.qwen_oracle import QwenOracle, write_qwen

TRAINED = 48
LENGTHS = [20, 47, 48, 49, 96, 97, 150, 200]  # bases of 1, 3, 7 and 15 times; answers cross from each to the next


@pytest.mark.parametrize(
    "options",
    [{}, {"use_logn_attn": False}, {"use_dynamic_ntk": False}, {"use_dynamic_ntk": False, "use_logn_attn": False}],
    ids=["both", "base by the prompt", "log-n attention", "neither"],
)
def test_contexts_past_the_trained_length_follow_the_equations(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_qwen(tmp_path, seq_length=TRAINED, **options)
    oracle = QwenOracle(folder)
    prompts = random_prompts(200, LENGTHS)
    with_all = generate(small_engine(folder, blocks=128), prompts, 40)
    for prompt, answer in zip(prompts, with_all, strict=True):
        assert len(answer) == 40
        assert_greedy(oracle, prompt, answer)


def test_each_option_changes_what_long_contexts_say(tmp_path: Path) -> None:
    """Were it not so, the comparison above could not fail."""
    prompt = random_prompts(200, [200])[0]
    logits = []
    for number, options in enumerate(({}, {"use_logn_attn": False}, {"use_dynamic_ntk": False})):
        folder = tmp_path / str(number)
        folder.mkdir()
        logits.append(QwenOracle(write_qwen(folder, seq_length=TRAINED, **options)).logits(prompt))
    assert all(float((logits[0] - other).abs().max()) > 0.05 for other in logits[1:])


def test_long_answers_survive_preemption_and_come_out_of_prefixes(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path, seq_length=TRAINED)
    prompts = random_prompts(200, [60, 60, 40, 110])
    expected = [generate(small_engine(folder), [prompt], 30)[0] for prompt in prompts]
    tight = small_engine(folder, blocks=14)
    assert generate(tight, prompts, 30) == expected
    assert tight.stats().preemptions > 0
    assert generate(tight, prompts[3:], 30) == expected[3:]
