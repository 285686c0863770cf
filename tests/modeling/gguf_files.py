"""Writes GGUF files for tests with the `gguf` package: real ones out of model folders, and broken ones by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from mii.modeling.checkpoint import open_checkpoint

Change = Callable[[np.ndarray], np.ndarray]
Tensors = list[tuple[str, np.ndarray]]
Layout = Callable[[Mapping[str, Any], Tensors], Tensors]


def interleaved(heads: int) -> Change:
    """What the conversion of llama models does to query and key rows: the rotating halves of a head take turns."""

    def change(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return change


def regrouped(heads: int, groups: int) -> Change:
    """What the conversion of falcon models does: all queries, then all keys, then all values."""

    def change(rows: np.ndarray) -> np.ndarray:
        grouped = rows.reshape(groups, heads // groups + 2, -1, *rows.shape[1:])
        parts = [grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]]
        return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])

    return change


def convert(
    folder: Path,
    path: Path,
    architecture: str,
    keys: Callable[[gguf.GGUFWriter, Mapping[str, Any]], None],
    *,
    layout: Layout = lambda config, tensors: tensors,
    **extra: Any,
) -> Path:
    """Writes a model folder as GGUF in the way that the public converter does, names by the package's own table.

    Args:
        folder: Safetensors with config.json.
        path: The file to write.
        architecture: The GGUF name of it.
        keys: Writes metadata beyond the sizes that every model has.
        layout: Arranges the tensors as older or newer converters do.
        extra: Further tensors, by GGUF name with "__" for ".".
    """
    writer = gguf.GGUFWriter(path, architecture)
    with open_checkpoint(folder) as checkpoint:
        config = _with_common_names(json.loads((folder / "config.json").read_text()))
        _sizes(writer, config)
        keys(writer, config)
        tensors = _converted(architecture, config, checkpoint)
        for name, tensor in layout(config, tensors):
            writer.add_tensor(name, tensor)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), np.asarray(values, dtype=np.float32))
    return finish(writer)


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def _with_common_names(config: dict[str, Any]) -> dict[str, Any]:
    """GPT-2, GPT-J and Bloom have names of their own for the sizes."""
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    names |= {"n_positions": "max_position_embeddings", "seq_length": "max_position_embeddings"}
    common = {names[name]: value for name, value in config.items() if name in names}
    if config["model_type"] in ("bloom", "gpt2", "gptj"):
        hidden = {**config, **common}["hidden_size"]
        common |= {"intermediate_size": config.get("n_inner") or 4 * hidden}
    return config | common


def _kv_heads(config: Mapping[str, Any]) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1  # Falcon's config then leaves another number in num_kv_heads
    if config["model_type"] in ("bloom", "gpt2", "gptj", "gpt_neox"):
        return config["num_attention_heads"]
    return config.get("num_kv_heads") or config.get("num_key_value_heads") or config["num_attention_heads"]


def _sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    kv_heads = _kv_heads(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("ffn_hidden_size") or config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope.get("full_attention", rope).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.get("rotary_dim") or int(head_dim * rope.get("partial_rotary_factor", 1.0)))


def _converted(architecture: str, config: Mapping[str, Any], checkpoint: Any) -> Tensors:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    tensors: dict[str, np.ndarray] = {}
    stacked: dict[str, list[np.ndarray]] = {}
    for name in checkpoint.names():
        values = checkpoint.get(name, torch.float32).numpy().copy()
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        merged, expert = _without_expert(name.removeprefix("transformer.") if architecture == "bloom" else name)
        target = table.get_name(merged, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if expert is not None:
            stacked.setdefault(target, []).append(values)  # names() lists a layer's experts in order
        else:
            tensors[target] = _changed(architecture, config, target, values)
    return [*tensors.items(), *((name, np.stack(parts)) for name, parts in stacked.items())]


def experts_one_by_one(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Of early 2024: a tensor for each expert."""
    found: Tensors = []
    for name, values in tensors:
        one = name.replace("_exps.", ".{}.")
        found += [(one.format(i), each) for i, each in enumerate(values)] if "_exps." in name else [(name, values)]
    return found


def fused_heads(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Of the first Phi-2: all queries, all keys and all values in one tensor."""
    by_name = dict(tensors)
    for name in [name for name in by_name if ".attn_q." in name]:
        parts = [by_name.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
        by_name[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return list(by_name.items())


def keys_and_values_apart(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Of 2025: for each head what makes keys of latents, transposed, and what makes values."""
    found: Tensors = []
    for name, values in tensors:
        if ".attn_kv_b." not in name:
            found.append((name, values))
            continue
        heads = values.reshape(config["num_attention_heads"], -1, values.shape[-1])
        keys, others = heads[:, : config["qk_nope_head_dim"]], heads[:, config["qk_nope_head_dim"] :]
        found.append((name.replace("kv_b", "k_b"), np.ascontiguousarray(keys.swapaxes(1, 2))))
        found.append((name.replace("kv_b", "v_b"), np.ascontiguousarray(others)))
    return found


def _without_expert(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    if "experts" not in parts:
        return name, None
    at = parts.index("experts") + 1
    return ".".join(parts[:at] + parts[at + 1 :]), int(parts[at])


def _changed(architecture: str, config: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    if architecture in ("llama", "smollm3") and ".attn_q." in name:
        return interleaved(config["num_attention_heads"])(values)
    if architecture in ("llama", "smollm3") and ".attn_k." in name:
        return interleaved(config["num_key_value_heads"])(values)
    if architecture in ("falcon", "bloom", "gptneox") and ".attn_qkv." in name:
        return regrouped(config["num_attention_heads"], _kv_heads(config))(values)
    if architecture == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return np.ascontiguousarray(values.T)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return values.reshape(-1)
    return values


def by_hand(path: Path, *, version: int = 3, keys: bytes = b"", key_count: int = 0, tensors: bytes = b"",
            tensor_count: int = 0, data: bytes = b"", magic: bytes = b"GGUF") -> Path:  # fmt: skip
    """A file byte by byte, so that any part of it may be wrong."""
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + keys + tensors
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def text_key(name: str, text: str) -> bytes:
    return string(name) + struct.pack("<I", 8) + string(text)


def number_key(name: str, value: int) -> bytes:
    return string(name) + struct.pack("<II", 4, value)


def description(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor's entry; `shape` rows first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + sizes + struct.pack("<IQ", kind, offset)
