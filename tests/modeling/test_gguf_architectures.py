"""Models written as GGUF come back as they were: names, row orders, configs. Judged by transformers' logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mii.errors import CheckpointError
from mii.modeling.checkpoint import Checkpoint, open_checkpoint
from mii.modeling.checkpoint.gguf.architectures import ARCHITECTURES
from mii.modeling.families import FAMILIES
from tests.checkpoints import write_checkpoint
from tests.modeling.gguf_files import convert
from tests.oracle import Oracle, final_logits, random_prompts, small_engine, tolerance

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def rms(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def layer_norm(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["layer_norm_epsilon"])


def residuals(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    layer_norm(writer, config)
    writer.add_parallel_residual(config["use_parallel_residual"])


def window(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rms(writer, config)
    writer.add_sliding_window(config["sliding_window"])


def experts(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rms(writer, config)
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def pattern(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    window(writer, config)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def two_rotations(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    window(writer, config)
    scaling = config["rope_parameters"]["full_attention"]
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def soft_caps(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    window(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def latents(writer: gguf.GGUFWriter, config: Mapping[str, Any], *, apart: bool = False) -> None:
    rms(writer, config)
    rope, key = config["qk_rope_head_dim"], config["qk_rope_head_dim"] + config["qk_nope_head_dim"]
    sizes = (key, config["v_head_dim"])
    if apart:
        writer.add_key_length_mla(sizes[0])
        writer.add_value_length_mla(sizes[1])
        writer.add_head_count_kv(1)
        sizes = (config["kv_lora_rank"] + rope, config["kv_lora_rank"])
    writer.add_key_length(sizes[0])
    writer.add_value_length(sizes[1])
    writer.add_rope_dimension_count(rope)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["n_group"]:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    scaling = config["rope_parameters"]
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


LATENTS = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 40,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
GROUPS = {"n_group": 4, "topk_group": 2, "q_lora_rank": 32, "routed_scaling_factor": 3.0}
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
GEMMA3 = {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
# row of the table: (model_type, GGUF architecture, keys, config fields)
CASES: dict[str, tuple[str, str, Callable[[gguf.GGUFWriter, Mapping[str, Any]], None], dict[str, Any]]] = {
    "llama": ("llama", "llama", rms, {"rms_norm_eps": 1e-4}),
    "llama, tied, biased, wide heads": (
        "llama",
        "llama",
        rms,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama+sliding": ("mistral", "llama", window, {"sliding_window": 8}),
    "llama+experts": ("mixtral", "llama", experts, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "qwen2", rms, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen2moe": ("qwen2_moe", "qwen2moe", experts, MOE),
    "qwen3": ("qwen3", "qwen3", rms, {"head_dim": 16}),
    "qwen3moe": (
        "qwen3_moe",
        "qwen3moe",
        experts,
        {
            "head_dim": 16,
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "deepseek2": ("deepseek_v2", "deepseek2", latents, LATENTS),
    "deepseek2, groups": (
        "deepseek_v2",
        "deepseek2",
        latents,
        {**LATENTS, **GROUPS, "topk_method": "group_limited_greedy", "attention_bias": True},
    ),
    "deepseek2+sigmoid": ("deepseek_v3", "deepseek2", latents, {**LATENTS, **GROUPS}),
    "phi3": ("phi3", "phi3", window, {"sliding_window": 16}),
    "phi2": ("phi", "phi2", layer_norm, {}),
    "gemma": ("gemma", "gemma", rms, {"head_dim": 16}),
    "gemma2": ("gemma2", "gemma2", soft_caps, {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "bloom": ("bloom", "bloom", layer_norm, {"seq_length": 64}),
    "gpt2": ("gpt2", "gpt2", layer_norm, {"n_inner": 40}),
    "gpt2, untied": ("gpt2", "gpt2", layer_norm, {"tie_word_embeddings": False}),
    "gptj": ("gptj", "gptj", layer_norm, {"rotary_dim": 4, "n_inner": 40}),
    "gptneox": ("gpt_neox", "gptneox", residuals, {}),
    "gptneox, sequential, no biases": (
        "gpt_neox",
        "gptneox",
        residuals,
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    "gemma3": ("gemma3_text", "gemma3", two_rotations, GEMMA3),
    "gemma3, scaled": (
        "gemma3_text",
        "gemma3",
        two_rotations,
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo2": ("olmo2", "olmo2", rms, {}),
    "smollm3": ("smollm3", "smollm3", rms, {"num_hidden_layers": 5, "attention_bias": True}),
    "exaone4": ("exaone4", "exaone4", rms, {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone4, windows": (
        "exaone4",
        "exaone4",
        pattern,
        {"num_hidden_layers": 3, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "falcon": ("falcon", "falcon", layer_norm, {"multi_query": True, "new_decoder_architecture": False}),
    "falcon+two norms": ("falcon", "falcon", layer_norm, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, one norm, groups": (
        "falcon",
        "falcon",
        layer_norm,
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
}


def make(tmp_path: Path, case: str) -> tuple[Path, Checkpoint]:
    model_type, architecture, keys, fields = CASES[case]
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, model_type, tokenizer=False, **{**SHAPE, **fields})
    return folder, open_checkpoint(convert(folder, tmp_path / "model.gguf", architecture, keys))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def as_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.get(name).contiguous().clone() for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_row_of_the_table_has_a_case() -> None:
    assert set(ARCHITECTURES) <= {*CASES, "qwen"}


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_config_come_back_as_they_were(tmp_path: Path, case: str) -> None:
    folder, checkpoint = make(tmp_path, case)
    with checkpoint, open_checkpoint(folder) as original:
        assert sorted(checkpoint.names()) == sorted(original.names())
        for name in original.names():
            assert checkpoint.shape(name) == original.shape(name)
            # norms that were stored with one added come back with a rounding error
            torch.testing.assert_close(checkpoint.get(name), original.get(name), rtol=0, atol=1e-6)
        assert checkpoint.config["architectures"] == original.config["architectures"]
        has_head = not {"lm_head.weight", "embed_out.weight"}.isdisjoint(original.names())
        assert bool(checkpoint.config["tie_word_embeddings"]) == (not has_head)
        again = as_folder(checkpoint, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(folder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case, (model_type, *_) in CASES.items() if model_type in {f.name for f in FAMILIES.values()}]
)
def test_the_engine_computes_from_the_file_what_transformers_computes_from_the_folder(
    tmp_path: Path, case: str
) -> None:
    folder, checkpoint = make(tmp_path, case)
    checkpoint.close()
    oracle, engine = Oracle(folder), small_engine(checkpoint.path)
    prompt = random_prompts(96, [40])[0]
    expected = oracle.logits(prompt)
    assert (final_logits(engine, prompt) - expected).abs().max() <= tolerance(expected, "fp32")


@pytest.mark.parametrize("case", ["llama", "falcon+two norms", "qwen2moe", "gemma", "gpt2"])
def test_slices_are_slices_of_the_whole(tmp_path: Path, case: str) -> None:
    _, checkpoint = make(tmp_path, case)
    with checkpoint:
        for name in checkpoint.names():
            whole = checkpoint.get(name)
            for index in ((slice(1, 7),), (slice(0, 0),), (slice(2, None), slice(3, 11))):
                if len(index) <= whole.dim():
                    assert torch.equal(checkpoint.get(name, torch.float64, index), whole[index].double()), (name, index)


def with_tokens(kinds: dict[str, int], **ids: int) -> Callable[[gguf.GGUFWriter, Mapping[str, Any]], None]:
    def write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        names = [*kinds, *(f"t{number}" for number in range(96 - len(kinds)))]
        writer.add_token_list(names)
        writer.add_token_types([*kinds.values(), *[1] * (96 - len(kinds))])
        for role, token in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)

    return write


@pytest.mark.parametrize(
    ("kinds", "ids", "ends"),
    [
        ({"<s>": 3, "</s>": 3}, {"eos": 1}, 1),
        ({"<|end_of_text|>": 3, "<|eot_id|>": 3, "<|eom_id|>": 3}, {"eos": 0, "eot": 1, "eom": 2}, [0, 1, 2]),
        ({"<|end_of_text|>": 3, "a": 1, "<|eot_id|>": 3}, {"eos": 0}, [0, 2]),
        ({"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3}, {"eos": 2, "unknown": 0}, 2),
        ({"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3}, {"eos": 2, "bos": 0}, [2, 0]),
        ({"<bos>": 3, "<eos>": 3, "<end_of_turn>": 3}, {"bos": 0, "eos": 1}, [1, 2]),
        ({"[BOS]": 3, "[|endofturn|]": 3}, {"bos": 0}, 1),
        ({"<|im_end|>": 1}, {}, None),  # ordinary text that looks like it
        ({"a": 1}, {"eos": 4_000_000_000}, None),
    ],
)
def test_every_end_of_text_id_is_in_the_generation_config(
    tmp_path: Path, kinds: dict[str, int], ids: dict[str, int], ends: Any
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, "llama", tokenizer=False, **SHAPE)
    with open_checkpoint(convert(folder, tmp_path / "m.gguf", "llama", with_tokens(kinds, **ids))) as checkpoint:
        assert checkpoint.generation_config.get("eos_token_id") == ends


def test_a_split_file_is_opened_by_any_of_its_parts(tmp_path: Path) -> None:
    _, whole = make(tmp_path, "llama")
    parts = tmp_path / "parts"
    parts.mkdir()
    writer = gguf.GGUFWriter(parts / "m.gguf", "llama", split_max_tensors=8)
    _copy(tmp_path / "model.gguf", writer)
    for path in sorted(parts.glob("*.gguf"))[:2]:
        with open_checkpoint(path) as checkpoint:
            assert sorted(checkpoint.names()) == sorted(whole.names())
            for name in whole.names():
                assert torch.equal(checkpoint.get(name), whole.get(name))
    shutil.rmtree(parts)


def _copy(path: Path, writer: gguf.GGUFWriter) -> None:
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without(key: str) -> Callable[[gguf.GGUFWriter, Mapping[str, Any]], None]:
    def write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        for keys in writer.kv_data:
            keys.pop(key, None)

    return write


@pytest.mark.parametrize("key", ["llama.block_count", "llama.embedding_length", "llama.attention.head_count"])
def test_a_missing_size_is_named(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, "llama", tokenizer=False, **SHAPE)
    with pytest.raises(CheckpointError, match=f"lacks the metadata key {key}"):
        open_checkpoint(convert(folder, tmp_path / "m.gguf", "llama", without(key)))


def test_a_tensor_that_the_architecture_does_not_have_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, "llama", tokenizer=False, **SHAPE)
    path = convert(folder, tmp_path / "m.gguf", "llama", rms, blk__0__ssm_conv__weight=[1.0, 2.0])
    with pytest.raises(CheckpointError, match=r"no place for tensor blk\.0\.ssm_conv\.weight"):
        open_checkpoint(path)
