"""Mixtures of experts in the layer library: where weights go, what a config may say, what a step computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii.errors import CheckpointError
from mii.modeling.experts import StackedParameter
from mii.modeling.families import FAMILIES
from mii.modeling.parameters import as_span
from tests.checkpoints import write_checkpoint
from tests.oracle import final_logits, generate, random_prompts, small_engine

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56}


def test_parts_of_a_stack_are_rows_of_one_expert() -> None:
    tensor = torch.zeros(3, 10, 4)
    stack = StackedParameter(tensor, {"gate": 6, "up": 4}, as_span(4))
    stack.view("1.gate").fill_(1)
    stack.view("2.up").fill_(2)
    assert tensor.view(-1, 4)[:, 0].tolist() == [0] * 10 + [1] * 6 + [0] * 4 + [0] * 6 + [2] * 4
    assert stack.view("2").shape == (10, 4)
    assert stack.view().shape == (3, 10, 4)


def test_a_stack_is_complete_when_every_part_of_every_expert_is() -> None:
    stack = StackedParameter(torch.zeros(2, 10, 4), {"gate": 6, "up": 4}, as_span(4))
    for part in ("0.gate", "1.up", "0.up"):
        stack.filled(part)
    assert stack.missing == {"1.gate"}
    stack.filled("1")
    assert not stack.missing
    whole = StackedParameter(torch.zeros(12, 10, 4), {"": 10}, as_span(4))
    whole.filled("1")
    assert "1" not in whole.missing
    assert {"10", "11"} <= whole.missing
    whole.filled()
    assert not whole.missing


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_both_layouts_of_a_checkpoint_give_the_same(tmp_path: Path, model_type: str) -> None:
    fields = {"num_local_experts": 6, "num_experts_per_tok": 2} if model_type == "mixtral" else MOE
    logits = []
    for stacked in (False, True):
        folder = tmp_path / str(stacked)
        folder.mkdir()
        write_checkpoint(folder, model_type, stacked=stacked, dtype="bfloat16", **fields)
        engine = small_engine(folder, dtype="bf16")
        logits.append(final_logits(engine, random_prompts(engine.vocab_size, [20])[0]))
        engine.destroy()
    assert torch.equal(*logits)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", **MOE)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = re.escape("1 weights are missing: model.layers.1.mlp.experts.4.up_proj.weight")
    with pytest.raises(CheckpointError, match=message):
        small_engine(tmp_path)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral", num_local_experts=3)
    name, tensors = "model.layers.0.block_sparse_moe.experts.2.w2.weight", load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=re.escape(f"{name} has shape [192, 343], the config asks for [192, 344]")
    ):
        small_engine(tmp_path)


CONFIG: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 9}, "cannot go to 9 experts ('num_experts_per_tok') of 8"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "cannot go to 9 experts ('num_experts_per_tok') of 8"),
        ("Qwen3MoeForCausalLM", {"num_experts": -1}, "'num_experts' must be a positive whole number, and it is -1"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 9}, "'num_experts' is 8 and 'num_local_experts' is 9"),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [4]}, "'mlp_only_layers' must list layers from 0 to 3"),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": 1}, "'mlp_only_layers' must list layers from 0 to 3, and it is 1"),
        ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be a positive whole number"),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false"),
        ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": "x"}, "'shared_expert_intermediate_size' must be"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_field(
    architecture: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        FAMILIES[architecture].read_spec({**CONFIG, **change})


def test_dense_layers_follow_from_the_step_and_the_list() -> None:
    def layers(**change: Any) -> tuple[bool, ...] | None:
        experts = FAMILIES["Qwen2MoeForCausalLM"].read_spec({**CONFIG, **change}).experts
        return None if experts is None else experts.layers

    assert layers() == (True,) * 4
    assert layers(decoder_sparse_step=2) == (False, True, False, True)
    assert layers(mlp_only_layers=[0, 3]) == (False, True, True, False)
    assert layers(mlp_only_layers=[0, 1, 2, 3]) is None
    assert layers(num_experts=0) is None


def test_a_step_with_experts_is_recorded(tmp_path: Path) -> None:
    """On a CPU a decode step becomes one list of native calls; an operation in torch would keep it from that."""
    write_checkpoint(tmp_path, "qwen2_moe", **MOE)
    engine = small_engine(tmp_path)
    assert engine.runner is not None
    generate(engine, random_prompts(engine.vocab_size, [5, 9]), 8)
    assert len(engine.runner._recorded) > 0
