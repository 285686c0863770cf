"""The real SmolLM2-135M against transformers on the same weights.

transformers gets the weights from our reader, which other tests hold bit for bit to the gguf package: its own GGUF path
takes half a minute. In float32 a logit may differ by 1e-4 of the largest one, what two orders of summation differ by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mii.config import ModelConfig
from mii.engine import Engine, load_engine
from mii.modeling.checkpoint import open_checkpoint
from mii.modeling.tokenizers import load_tokenizer
from tests.oracle import generate

PROMPTS = [
    "DeepSpeed is",
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
]


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with open_checkpoint(str(smollm2)) as checkpoint, torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    model = model.to_empty(device="cpu").float()
    with open_checkpoint(str(smollm2)) as checkpoint:
        state = {name: checkpoint.get(name, torch.float32) for name in checkpoint.names()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is computed, not stored
    return model.eval()


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return load_engine(ModelConfig(model_name_or_path=str(smollm2), device="cpu", dtype="fp32", progress=False))


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(str(smollm2))
    return [list(tokenizer.encode(text)) for text in PROMPTS]


@torch.inference_mode()
def test_logits_equal_transformers(oracle: Any, engine: Engine, prompts: list[list[int]]) -> None:
    for uid, prompt in enumerate(prompts):
        expected = oracle(torch.tensor([prompt])).logits[0, -1]
        got = engine.put([uid], [prompt])[0]
        engine.flush(uid)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_greedy_tokens_equal_transformers(oracle: Any, engine: Engine, prompts: list[list[int]]) -> None:
    """Each token is the best one after those before it, so transformers would have chosen the same."""
    for prompt, answer in zip(prompts, generate(engine, prompts, 24), strict=True):
        assert len(answer) == 24
        chosen_from = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert answer == chosen_from.argmax(1).tolist()
