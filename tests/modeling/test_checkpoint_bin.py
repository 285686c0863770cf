"""PyTorch's own files: memory-mapped, sharded, in the old format, and never running what they bring along."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mii.errors import CheckpointError
from mii.modeling.checkpoint import checkpoint_size, open_checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


def folder_with(tmp_path: Path, content: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    torch.save(content, tmp_path / name, **options)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_tensors_are_read_as_stored_converted_and_in_slices(tmp_path: Path, name: str) -> None:
    with open_checkpoint(folder_with(tmp_path, TENSORS, name)) as checkpoint:
        assert checkpoint.kind == "bin"
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert checkpoint.shape("a") == (2, 3)
        assert checkpoint_size(checkpoint) == 6 * 4 + 5 * 2
        assert torch.equal(checkpoint.get("a"), TENSORS["a"])
        assert checkpoint.get("b").dtype == torch.bfloat16
        assert checkpoint.get("a", torch.float16, (slice(1, 2), slice(0, 2))).tolist() == [[3.0, 4.0]]
        checkpoint.prefetch({"a": None})
        with pytest.raises(CheckpointError, match="no tensor c"):
            checkpoint.get("c")


def test_the_format_from_before_pytorch_1_6_is_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TENSORS, _use_new_zipfile_serialization=False)
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.get("a"), TENSORS["a"])


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_a_state_dict_inside_of_a_training_checkpoint_is_found(tmp_path: Path, wrapper: str) -> None:
    folder = folder_with(tmp_path, {wrapper: TENSORS, "step": 7, "lr": 0.1})
    assert sorted(open_checkpoint(folder).names()) == ["a", "b"]


def test_parameters_come_without_gradients(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"p": torch.nn.Parameter(torch.ones(2))})
    assert not open_checkpoint(folder).get("p").requires_grad


def test_shards_by_index(tmp_path: Path) -> None:
    torch.save({"a": TENSORS["a"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    folder = folder_with(tmp_path, {"b": TENSORS["b"]}, "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert torch.equal(checkpoint.get("b"), TENSORS["b"])
    weight_map["a"] = weight_map["b"]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"places tensor a in .*, which does not have it"):
        open_checkpoint(folder)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_with(tmp_path, {"a": TENSORS["a"], "x": Attack()})
    with pytest.raises(CheckpointError, match=r"could run code. Convert the model to safetensors"):
        open_checkpoint(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("old", [False, True])
def test_truncated_files_are_refused(tmp_path: Path, old: bool) -> None:
    folder = folder_with(tmp_path, {"a": torch.zeros(500)}, _use_new_zipfile_serialization=not old)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for length in (1, 3, 60, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated, corrupt or no PyTorch checkpoint"):
            open_checkpoint(folder)


@pytest.mark.parametrize(("content", "message"), [([1, 2], "holds a list"), ({"a": 1}, "holds no tensors")])
def test_files_without_tensors_by_name_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder_with(tmp_path, content))


def test_text_and_empty_files_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TENSORS)
    (folder / "pytorch_model.bin").write_text("<!doctype html><title>404</title>")
    with pytest.raises(CheckpointError, match="no PyTorch checkpoint"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(folder)
