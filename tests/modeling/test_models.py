"""Weights that are missing, unexpected or of another shape are named; older names of weights are understood."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii.errors import CheckpointError
from tests.oracle import Oracle, final_logits, random_prompts, small_engine, tolerance
from tests.variants import deepseek_v3

Tensors = dict[str, torch.Tensor]
SMALL: Mapping[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": None}


def changed(folder: Path, to: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a model folder with other tensors and fields of its config."""
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # of a mapped file
    save_file(change(tensors), path, metadata={"format": "pt"})
    fields = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**fields, **config}))
    return to


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(pattern: str, replacement: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


@pytest.fixture
def gpt2(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("gpt2", **SMALL)


def test_a_missing_weight_is_named(gpt2: Path, tmp_path: Path) -> None:
    folder = changed(gpt2, tmp_path / "m", without("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(CheckpointError, match=r"1 weights are missing: transformer\.h\.1\.mlp\.c_fc\.bias\."):
        small_engine(folder)


def test_an_unexpected_weight_is_named(gpt2: Path, tmp_path: Path) -> None:
    folder = changed(gpt2, tmp_path / "m", lambda tensors: {**tensors, "transformer.h.0.adapter": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"no place in a gpt2 model: transformer\.h\.0\.adapter\. Either"):
        small_engine(folder)


def test_deepseeks_layer_that_predicts_a_further_token_is_left_out(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    further = {"model.layers.61.eh_proj.weight": torch.ones(3), "model.layers.61.input_layernorm.weight": torch.ones(3)}
    made = make_checkpoint("deepseek_v3", **deepseek_v3.GROUPS)
    small_engine(changed(made, tmp_path / "m", lambda tensors: {**tensors, **further})).destroy()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("transformer.h.0.attn.c_attn.weight", [96, 32], [32, 96]),  # stored as [in, out]
        ("transformer.h.0.attn.c_attn.bias", [32], [96]),
        ("transformer.wpe.weight", [64, 32], [512, 32]),
    ],
)
def test_a_weight_of_another_shape_is_named_with_both_shapes(
    gpt2: Path, tmp_path: Path, name: str, shape: list[int], expected: list[int]
) -> None:
    folder = changed(gpt2, tmp_path / "m", lambda tensors: {**tensors, name: torch.zeros(shape)})
    message = f"{name} has shape {shape}, the config asks for {expected}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        small_engine(folder)


OLD_NAMES: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "GPT-2 without the prefix, with the mask": (
        "gpt2",
        {},
        lambda tensors: renamed(r"^transformer\.", "")(tensors) | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)},
        {},
    ),
    "Bloom without the prefix": ("bloom", {}, renamed(r"^transformer\.", ""), {}),
    "OPT without the prefix": ("opt", {"ffn_dim": 64}, renamed(r"^model\.", ""), {}),
    "GPT-NeoX with lm_head": ("gpt_neox", {"intermediate_size": 64}, renamed(r"^embed_out\.", "lm_head."), {}),
    "GPT-NeoX with the mask and the table": (
        "gpt_neox",
        {"intermediate_size": 64},
        lambda tensors: {
            **tensors,
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
        {},
    ),
    "Falcon by its first name": (
        "falcon",
        {},
        lambda tensors: tensors,
        {"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel"},
    ),
    "a head beside tied embeddings": (
        "opt",
        {"ffn_dim": 64},
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()},
        {},
    ),
}


@pytest.mark.parametrize("case", OLD_NAMES)
def test_checkpoints_with_older_names_are_read(case: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    model_type, options, change, config = OLD_NAMES[case]
    folder = make_checkpoint(model_type, **SMALL, **options)
    prompt = random_prompts(200, [20])[0]
    expected = Oracle(folder).logits(prompt)
    logits = final_logits(small_engine(changed(folder, tmp_path / "m", change, **config)), prompt)
    assert (logits - expected).abs().max() <= tolerance(expected, "fp32")
