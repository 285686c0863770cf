"""The real thing: SmolLM2's GGUF file against the `gguf` package and against facts about the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from mii.modeling.checkpoint import Checkpoint, checkpoint_size, open_checkpoint

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 30


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2) as opened:
        yield opened


def test_the_config_is_the_model_s(checkpoint: Checkpoint) -> None:
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    assert {name: checkpoint.config[name] for name in expected} == expected
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_all_272_tensors_are_there_under_their_names(checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert sum(torch.Size(checkpoint.shape(name)).numel() for name in names) == 134_515_008
    assert checkpoint.shape("model.layers.29.self_attn.k_proj.weight") == (KV_HEADS * HEAD_DIM, 576)
    assert 96_000_000 < checkpoint_size(checkpoint) < 98_362_432


STORED_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)


def stored_name(name: str) -> str:
    found = STORED_NAMES.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return found


def test_every_tensor_equals_the_gguf_package_s_bit_for_bit(checkpoint: Checkpoint, smollm2: Path) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    for name in checkpoint.names():
        tensor = stored[stored_name(name)]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads:  # the file interleaves the halves of each head that rotate together
            expected = expected.view(heads, HEAD_DIM // 2, 2, -1).transpose(1, 2).reshape(expected.shape)
        assert torch.equal(checkpoint.get(name, torch.float32), expected), name
        assert torch.equal(checkpoint.get(name, torch.bfloat16), expected.bfloat16()), name


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 1),),
        (slice(100, 163),),
        (slice(64, 192), slice(0, 96)),
        (slice(None), slice(37, 171)),
        (slice(5, 6), slice(31, 33)),
        (slice(9, 90), slice(64, 96)),
        (slice(0, 0), slice(8, 8)),
    ],
)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_slices_cross_heads_and_blocks_where_they_like(
    checkpoint: Checkpoint, name: str, index: tuple[slice, ...]
) -> None:
    full = f"model.layers.3.{name}.weight"
    assert torch.equal(checkpoint.get(full, torch.float16, index), checkpoint.get(full, torch.float16)[index])


def test_norms_are_views_of_the_file(checkpoint: Checkpoint) -> None:
    norm = checkpoint.get("model.norm.weight")
    assert norm.dtype == torch.float32
    assert norm.data_ptr() == checkpoint.get("model.norm.weight").data_ptr()
