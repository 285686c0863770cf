"""GGUF files of every family give what the folders that they were made from give, from the config to the tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import gguf
import pytest

from mii.errors import CheckpointError
from mii.modeling.checkpoint import checkpoint_size, open_checkpoint
from mii.modeling.families import FAMILIES
from tests.checkpoints import write_checkpoint
from tests.modeling.gguf_files import (
    Layout,
    Tensors,
    convert,
    experts_one_by_one,
    fused_heads,
    keys_and_values_apart,
)
from tests.modeling.test_gguf_architectures import CASES, SHAPE, latents
from tests.oracle import final_logits, generate, random_prompts, small_engine, tolerance
from tests.qwen_oracle import write_qwen

LENGTHS = [5, 20, 40]


def assert_same(folder: Path, file: Path) -> None:
    ours, theirs = small_engine(file), small_engine(folder)
    prompts = random_prompts(SHAPE["vocab_size"], LENGTHS)
    assert generate(ours, prompts, 20) == generate(theirs, prompts, 20)
    for prompt in prompts:
        expected = final_logits(theirs, prompt)
        assert (final_logits(ours, prompt) - expected).abs().max() <= tolerance(expected, "fp32")


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_what_its_folder_gives(tmp_path: Path, case: str) -> None:
    model_type, architecture, keys, fields = CASES[case]
    write_checkpoint(tmp_path, model_type, tokenizer=False, **{**SHAPE, **fields})
    config = json.loads((tmp_path / "config.json").read_text())
    if config["architectures"][0] not in FAMILIES:
        pytest.skip(f"{config['architectures'][0]} is not served")
    assert_same(tmp_path, convert(tmp_path, tmp_path / "model.gguf", architecture, keys))


@pytest.mark.parametrize("case", ["deepseek2", "deepseek2+sigmoid"])
def test_a_file_may_keep_apart_what_makes_keys_and_values(tmp_path: Path, case: str) -> None:
    model_type, architecture, _, fields = CASES[case]
    write_checkpoint(tmp_path, model_type, tokenizer=False, **{**SHAPE, **fields})
    keys = partial(latents, apart=True)
    assert_same(tmp_path, convert(tmp_path, tmp_path / "model.gguf", architecture, keys, layout=keys_and_values_apart))


@pytest.mark.parametrize(("case", "layout"), [("llama+experts", experts_one_by_one), ("phi2", fused_heads)])
def test_a_file_may_have_the_layout_of_older_converters(tmp_path: Path, case: str, layout: Layout) -> None:
    model_type, architecture, keys, fields = CASES[case]
    write_checkpoint(tmp_path, model_type, tokenizer=False, **{**SHAPE, **fields})
    file = convert(tmp_path, tmp_path / "model.gguf", architecture, keys, layout=layout)
    with open_checkpoint(tmp_path) as folder, open_checkpoint(file) as gguf_file:
        assert set(gguf_file.names()) == set(folder.names())
        assert checkpoint_size(gguf_file) == checkpoint_size(folder)
    assert_same(tmp_path, file)


def test_a_fused_tensor_of_another_height_is_refused(tmp_path: Path) -> None:
    model_type, architecture, keys, fields = CASES["phi2"]
    write_checkpoint(tmp_path, model_type, tokenizer=False, **{**SHAPE, **fields})

    def cut(config: object, tensors: Tensors) -> Tensors:
        return [(name, values[:-1] if ".attn_qkv." in name else values) for name, values in fused_heads({}, tensors)]

    file = convert(tmp_path, tmp_path / "model.gguf", architecture, keys, layout=cut)
    with pytest.raises(CheckpointError, match=r"attn_qkv.\w+ has \d+ rows; its heads need \d+"):
        open_checkpoint(file)


def test_qwen_1(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter, config: object) -> None:
        writer.add_layer_norm_rms_eps(1e-6)

    write_qwen(tmp_path)
    assert_same(tmp_path, convert(tmp_path, tmp_path / "model.gguf", "qwen", keys))
