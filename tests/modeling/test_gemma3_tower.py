"""The text tower of a Gemma 3 checkpoint that sees: found under each of its names, and what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii.errors import CheckpointError
from tests.checkpoints import DEFAULTS
from tests.oracle import final_logits, generate, random_prompts, small_engine, tolerance

TEXT = {
    **DEFAULTS,
    "head_dim": 64,
    "initializer_range": 0.05,
    "num_hidden_layers": 3,
    "sliding_window": 20,
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {**VISION, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=1, image_token_index=260)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()


def as_saved(name: str) -> str:
    return name


def as_newer_releases_save(name: str) -> str:
    return name.replace("language_model.model.", "model.language_model.").replace(
        "vision_tower.", "model.vision_tower.", 1
    )


@pytest.mark.parametrize("rename", [as_saved, as_newer_releases_save])
def test_logits_and_greedy_tokens_equal_transformers(oracle: Any, tmp_path: Path, rename: Callable[[str], str]) -> None:
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    engine = small_engine(tmp_path)
    prompts = random_prompts(250, [5, 40, 60])
    answers = generate(engine, prompts, 24)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == answer
        assert (final_logits(engine, prompt) - logits[0]).abs().max() <= tolerance(logits[0], "fp32")


def test_a_tower_that_nobody_knows_is_named(oracle: Any, tmp_path: Path) -> None:
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "audio_tower.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    with pytest.raises(CheckpointError, match=r"1 weights have no place in a gemma3_text model: audio_tower.weight"):
        small_engine(tmp_path)
