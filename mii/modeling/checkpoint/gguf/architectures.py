"""How each GGUF architecture names and lays out the tensors of a Hugging Face model.

One row of `ARCHITECTURES` per architecture: the names without layer number and without ".weight" or ".bias", the rows
that the conversion to GGUF reordered, and the norms it added one to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mii.errors import CheckpointError, UnsupportedModelError
from mii.modeling.checkpoint.gguf.reader import GGUFTensor

Config = Mapping[str, Any]
RowOrder = Callable[[Config], torch.Tensor]

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>[^.]+)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")
# Tables that are computed from the config; `rope_freqs` and `rope_factors_*` are read by config.py.
_COMPUTED = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd"})


@dataclass(frozen=True, slots=True)
class Source:
    """Where a Hugging Face tensor comes from.

    Args:
        tensor: the stored tensor.
        expert: the index into its first dimension, for expert tensors that are stored stacked.
        rows: row r is the stored row `rows[r]`; None for all of them in the same order.
        offset: what to add to every number.
        transposed: rows are the stored columns.
    """

    tensor: GGUFTensor
    expert: int | None = None
    rows: torch.Tensor | None = None
    offset: float = 0.0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As the checkpoint gives the tensor; `stored_shape` is as it lies in the file."""
        shape = self.stored_shape if self.rows is None else (len(self.rows), *self.stored_shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table.

    Args:
        model_type: `model_type` of the Hugging Face config.
        model_class: the entry of its `architectures`.
        names: GGUF stem -> Hugging Face stem; `{layer}` and `{expert}` are filled in.
        row_orders: GGUF stem -> the stored row of each Hugging Face row, from the config.
        fused: GGUF stem -> the stems whose rows it holds one after the other, and where, from the config.
        norm_offset: what to add to the weight of every norm.
        transposed: GGUF stems of the matrices that the Hugging Face model keeps as [in, out].
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)
    fused: Mapping[str, Mapping[str, RowOrder]] = field(default_factory=dict)
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()


def _rotary_rows(heads: int, head_dim: int) -> torch.Tensor:
    """GGUF's llama interleaves the two halves of each head that rotate together; this brings them apart again."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _query_rows(config: Config) -> torch.Tensor:
    return _rotary_rows(config["num_attention_heads"], config["head_dim"])


def _key_rows(config: Config) -> torch.Tensor:
    return _rotary_rows(config["num_key_value_heads"], config["head_dim"])


def _grouped_rows(config: Config) -> torch.Tensor:
    """Falcon, Bloom and GPT-NeoX keep each group's queries, key and value together; GGUF has all queries, all keys, all
    values.
    """
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    width = config["hidden_size"] // heads
    rows = torch.arange((heads + 2 * groups) * width).view(-1, width)
    queries = rows[:heads].view(groups, -1, width)
    keys, values = rows[heads : heads + groups, None], rows[heads + groups :, None]
    return torch.cat([queries, keys, values], dim=1).reshape(-1)


def _part_rows(part: int) -> RowOrder:
    """Rows of the queries (0), the keys (1) or the values (2) of a matrix that holds all of them."""

    def rows(config: Config) -> torch.Tensor:
        queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        return torch.arange(queries + 2 * keys).split([queries, keys, keys])[part]

    return rows


_LAYER = "model.layers.{layer}."
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": _LAYER + "self_attn.q_proj",
    "attn_k": _LAYER + "self_attn.k_proj",
    "attn_v": _LAYER + "self_attn.v_proj",
    "attn_output": _LAYER + "self_attn.o_proj",
    "attn_norm": _LAYER + "input_layernorm",
}
_MLP = {
    "ffn_norm": _LAYER + "post_attention_layernorm",
    "ffn_gate": _LAYER + "mlp.gate_proj",
    "ffn_up": _LAYER + "mlp.up_proj",
    "ffn_down": _LAYER + "mlp.down_proj",
}
_LLAMA = _OUTER | _ATTENTION | _MLP
_HEAD_NORMS = {"attn_q_norm": _LAYER + "self_attn.q_norm", "attn_k_norm": _LAYER + "self_attn.k_norm"}
_MIXTRAL = (
    _OUTER
    | _ATTENTION
    | {
        "ffn_norm": _LAYER + "post_attention_layernorm",
        "ffn_gate_inp": _LAYER + "block_sparse_moe.gate",
        "ffn_gate_exps": _LAYER + "block_sparse_moe.experts.{expert}.w1",
        "ffn_down_exps": _LAYER + "block_sparse_moe.experts.{expert}.w2",
        "ffn_up_exps": _LAYER + "block_sparse_moe.experts.{expert}.w3",
    }
)
_QWEN_MOE = (
    _OUTER
    | _ATTENTION
    | {
        "ffn_norm": _LAYER + "post_attention_layernorm",
        "ffn_gate_inp": _LAYER + "mlp.gate",
        "ffn_gate_exps": _LAYER + "mlp.experts.{expert}.gate_proj",
        "ffn_up_exps": _LAYER + "mlp.experts.{expert}.up_proj",
        "ffn_down_exps": _LAYER + "mlp.experts.{expert}.down_proj",
        "ffn_gate_inp_shexp": _LAYER + "mlp.shared_expert_gate",
        "ffn_gate_shexp": _LAYER + "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": _LAYER + "mlp.shared_expert.up_proj",
        "ffn_down_shexp": _LAYER + "mlp.shared_expert.down_proj",
    }
)
_DEEPSEEK = (
    _OUTER
    | _ATTENTION
    | _MLP
    | {
        "attn_q_a": _LAYER + "self_attn.q_a_proj",
        "attn_q_a_norm": _LAYER + "self_attn.q_a_layernorm",
        "attn_q_b": _LAYER + "self_attn.q_b_proj",
        "attn_kv_a_mqa": _LAYER + "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": _LAYER + "self_attn.kv_a_layernorm",
        "attn_kv_b": _LAYER + "self_attn.kv_b_proj",
        "attn_k_b": _LAYER + "self_attn.k_b_proj",  # of files since 2025, in place of the line before
        "attn_v_b": _LAYER + "self_attn.v_b_proj",
        "ffn_gate_inp": _LAYER + "mlp.gate",
        "exp_probs_b": _LAYER + "mlp.gate.e_score_correction_bias",
        "ffn_gate_exps": _LAYER + "mlp.experts.{expert}.gate_proj",
        "ffn_down_exps": _LAYER + "mlp.experts.{expert}.down_proj",
        "ffn_up_exps": _LAYER + "mlp.experts.{expert}.up_proj",
        "ffn_gate_shexp": _LAYER + "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": _LAYER + "mlp.shared_experts.up_proj",
        "ffn_down_shexp": _LAYER + "mlp.shared_experts.down_proj",
    }
)
_PHI3 = _OUTER | {
    "attn_norm": _LAYER + "input_layernorm",
    "attn_qkv": _LAYER + "self_attn.qkv_proj",
    "attn_output": _LAYER + "self_attn.o_proj",
    "ffn_norm": _LAYER + "post_attention_layernorm",
    "ffn_up": _LAYER + "mlp.gate_up_proj",
    "ffn_down": _LAYER + "mlp.down_proj",
}
_PHI2 = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
    "attn_norm": _LAYER + "input_layernorm",
    "attn_q": _LAYER + "self_attn.q_proj",
    "attn_k": _LAYER + "self_attn.k_proj",
    "attn_v": _LAYER + "self_attn.v_proj",
    "attn_output": _LAYER + "self_attn.dense",
    "ffn_up": _LAYER + "mlp.fc1",
    "ffn_down": _LAYER + "mlp.fc2",
}
_GEMMA2 = _LLAMA | {
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "ffn_norm": _LAYER + "pre_feedforward_layernorm",
    "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}
# The norms are of what the layers add, none of what they take.
_NORMED_BRANCHES = {stem: name for stem, name in _LLAMA.items() if stem not in ("attn_norm", "ffn_norm")} | {
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}
_BLOCK = "transformer.h.{layer}."
_QWEN = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": _BLOCK + "ln_1",
    "attn_qkv": _BLOCK + "attn.c_attn",
    "attn_output": _BLOCK + "attn.c_proj",
    "ffn_norm": _BLOCK + "ln_2",
    "ffn_gate": _BLOCK + "mlp.w2",
    "ffn_up": _BLOCK + "mlp.w1",
    "ffn_down": _BLOCK + "mlp.c_proj",
}
_FALCON = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": _BLOCK + "input_layernorm",
    "attn_qkv": _BLOCK + "self_attention.query_key_value",
    "attn_output": _BLOCK + "self_attention.dense",
    "ffn_up": _BLOCK + "mlp.dense_h_to_4h",
    "ffn_down": _BLOCK + "mlp.dense_4h_to_h",
}
# With two norms a block, GGUF calls the one of the MLP attn_norm and the one of the attention attn_norm_2.
_FALCON_NEW = _FALCON | {"attn_norm": _BLOCK + "ln_mlp", "attn_norm_2": _BLOCK + "ln_attn"}
_BLOOM = _FALCON | {
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "attn_norm": _BLOCK + "input_layernorm",
    "ffn_norm": _BLOCK + "post_attention_layernorm",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": _BLOCK + "ln_1",
    "attn_qkv": _BLOCK + "attn.c_attn",
    "attn_output": _BLOCK + "attn.c_proj",
    "ffn_norm": _BLOCK + "ln_2",
    "ffn_up": _BLOCK + "mlp.c_fc",
    "ffn_down": _BLOCK + "mlp.c_proj",
}
_GPTJ = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": _BLOCK + "ln_1",
    "attn_q": _BLOCK + "attn.q_proj",
    "attn_k": _BLOCK + "attn.k_proj",
    "attn_v": _BLOCK + "attn.v_proj",
    "attn_output": _BLOCK + "attn.out_proj",
    "ffn_up": _BLOCK + "mlp.fc_in",
    "ffn_down": _BLOCK + "mlp.fc_out",
}
_NEOX_BLOCK = "gpt_neox.layers.{layer}."
_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "attn_norm": _NEOX_BLOCK + "input_layernorm",
    "attn_qkv": _NEOX_BLOCK + "attention.query_key_value",
    "attn_output": _NEOX_BLOCK + "attention.dense",
    "ffn_norm": _NEOX_BLOCK + "post_attention_layernorm",
    "ffn_up": _NEOX_BLOCK + "mlp.dense_h_to_4h",
    "ffn_down": _NEOX_BLOCK + "mlp.dense_4h_to_h",
}

_SIGMOID = 2  # of the keys' values: how experts are scored
_ROTARY = {"attn_q": _query_rows, "attn_k": _key_rows}
_GROUPED = {"attn_qkv": _grouped_rows}
_FUSED = {"attn_qkv": {f"attn_{name}": _part_rows(part) for part, name in enumerate("qkv")}}
_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, _ROTARY),
    "llama+sliding": Architecture("mistral", "MistralForCausalLM", _LLAMA, _ROTARY),
    "llama+experts": Architecture("mixtral", "MixtralForCausalLM", _MIXTRAL, _ROTARY),
    "qwen": Architecture("qwen", "QWenLMHeadModel", _QWEN),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN_MOE),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA | _HEAD_NORMS),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN_MOE | _HEAD_NORMS),
    "deepseek2": Architecture("deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK),
    "deepseek2+sigmoid": Architecture("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3),
    "phi2": Architecture("phi", "PhiForCausalLM", _PHI2, fused=_FUSED),  # by its first converters
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, norm_offset=-1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, norm_offset=-1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA2 | _HEAD_NORMS, norm_offset=-1.0),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _NORMED_BRANCHES | _HEAD_NORMS),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, _ROTARY),
    "exaone4": Architecture("exaone4", "Exaone4ForCausalLM", _NORMED_BRANCHES | _HEAD_NORMS),
    "bloom": Architecture("bloom", "BloomForCausalLM", _BLOOM, _GROUPED),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", _GPT2, transposed=_CONV1D),
    "gptj": Architecture("gptj", "GPTJForCausalLM", _GPTJ),
    "gptneox": Architecture("gpt_neox", "GPTNeoXForCausalLM", _NEOX, _GROUPED),
    "falcon": Architecture("falcon", "FalconForCausalLM", _FALCON, _GROUPED),
    "falcon+two norms": Architecture("falcon", "FalconForCausalLM", _FALCON_NEW, _GROUPED),
}


def find_architecture(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> Architecture:
    """The row for a file, by `general.architecture` and what tells its variants apart.

    Raises:
        CheckpointError: the file does not say what it is.
        UnsupportedModelError: there is no row for it; the message lists the rows.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} has no metadata key general.architecture, so it holds no language model.")
    if name not in ARCHITECTURES:
        known = ", ".join(row for row in ARCHITECTURES if "+" not in row)
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {name!r}; mii reads these from GGUF: {known}."
        )
    if name == "llama" and metadata.get("llama.expert_count"):
        name = "llama+experts"
    elif name == "llama" and metadata.get("llama.attention.sliding_window"):
        name = "llama+sliding"
    elif name == "deepseek2" and metadata.get("deepseek2.expert_gating_func") == _SIGMOID:
        name = "deepseek2+sigmoid"
    elif name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        name = "falcon+two norms"
    return ARCHITECTURES[name]


def map_tensors(
    path: Path, architecture: Architecture, config: Config, tensors: Mapping[str, GGUFTensor]
) -> dict[str, Source]:
    """Hugging Face name -> where it comes from, for every tensor of a model.

    Raises:
        CheckpointError: the file has a tensor that the architecture does not, or one of another height than its heads.
    """
    orders = {stem: {stem: make(config)} for stem, make in architecture.row_orders.items()}
    orders |= {stem: {part: make(config) for part, make in parts.items()} for stem, parts in architecture.fused.items()}
    mapped: dict[str, Source] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        stem = match["stem"] + ("_exps" if match["expert"] else "") if match else name
        if stem in _COMPUTED:
            continue
        parts = orders.get(stem, {stem: None})
        if match is None or not parts.keys() <= architecture.names.keys():
            raise CheckpointError(f"{path}: a {architecture.model_type} model has no place for tensor {name}.")
        _check_rows(path, name, tensor, parts.values())
        # Biases of norms are stored as they are.
        offset = architecture.norm_offset if stem.endswith("norm") and match["kind"] == "weight" else 0.0
        transposed = stem in architecture.transposed and match["kind"] == "weight"
        for part, rows in parts.items():
            mapped |= _named(architecture.names[part], match, tensor, rows, offset, transposed)
    return mapped


def _check_rows(path: Path, name: str, tensor: GGUFTensor, parts: Iterable[torch.Tensor | None]) -> None:
    needed = sum(len(rows) for rows in parts if rows is not None)
    if needed and tensor.shape[0] != needed:
        raise CheckpointError(f"{path}: tensor {name} has {tensor.shape[0]} rows; its heads need {needed}.")


def _named(
    target: str, match: re.Match[str], tensor: GGUFTensor, rows: torch.Tensor | None, offset: float, transposed: bool
) -> dict[str, Source]:
    ending = "" if target.endswith("_bias") else "." + match["kind"]
    if match["stem"] == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:  # a matrix of one row, stored as a vector
        tensor = replace(tensor, shape=(1, *tensor.shape))
    if "{expert}" not in target or match["expert"]:  # files of early 2024 keep each expert by itself
        source = Source(tensor, rows=rows, offset=offset, transposed=transposed)
        return {target.format(layer=match["layer"], expert=match["expert"]) + ending: source}
    return {
        target.format(layer=match["layer"], expert=expert) + ending: Source(tensor, expert)
        for expert in range(tensor.shape[0])
    }
