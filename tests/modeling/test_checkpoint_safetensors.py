"""Safetensors files: views of the file, slices, shards, and that every kind of damage is one clear error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mii.errors import CheckpointError
from mii.modeling.checkpoint import checkpoint_size, open_checkpoint
from mii.modeling.checkpoint.mapping import MappedFile
from mii.modeling.checkpoint.safetensors import read_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16,
          torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]  # fmt: skip


def folder_with(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def by_hand(tmp_path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(4, 6).to(dtype)
    with open_checkpoint(folder_with(tmp_path, {"w": values})) as checkpoint:
        read = checkpoint.get("w")
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


def test_names_shapes_sizes_and_configs(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.path == folder
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert checkpoint.shape("a") == (3, 5)
        assert checkpoint_size(checkpoint) == 3 * 5 * 4 + 7 * 2
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.generation_config == {"eos_token_id": [1, 2]}


def test_a_tensor_in_its_stored_dtype_is_a_view_of_the_file(tmp_path: Path) -> None:
    with open_checkpoint(folder_with(tmp_path, {"w": torch.arange(12.0).reshape(3, 4)})) as checkpoint:
        first, again = checkpoint.get("w"), checkpoint.get("w", torch.float32)
        part = checkpoint.get("w", index=(slice(1, 3), slice(2, 4)))
        assert first.data_ptr() == again.data_ptr()
        assert part.data_ptr() == first[1:, 2:].data_ptr()
        assert part.tolist() == [[6, 7], [10, 11]]
        assert checkpoint.get("w", torch.bfloat16, (slice(0, 1),)).tolist() == [[0, 1, 2, 3]]


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"w": torch.zeros(4)})
    with open_checkpoint(folder) as checkpoint:
        checkpoint.get("w").fill_(1)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.get("w").tolist() == [0, 0, 0, 0]


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_with(tmp_path, {"w": torch.arange(6.0)}))
    tensor = checkpoint.get("w")
    checkpoint.close()
    checkpoint.close()
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_tensor_off_its_alignment_is_read_too(tmp_path: Path) -> None:
    data = b"\7" + np.array([1.5, -2.0], dtype=np.float32).tobytes()
    folder = by_hand(tmp_path, {"c": entry("U8", [1], [0, 1]), "w": entry(offsets=[1, 9])}, data)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.get("w").tolist() == [1.5, -2.0]


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"none": torch.zeros(0, 4), "scalar": torch.tensor(3.0)}
    with open_checkpoint(folder_with(tmp_path, tensors)) as checkpoint:
        assert checkpoint.get("none").shape == (0, 4)
        assert checkpoint.get("scalar").item() == 3.0


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with (
        open_checkpoint(folder_with(tmp_path, {"model.norm.weight": torch.zeros(1)})) as checkpoint,
        pytest.raises(CheckpointError, match=r"no tensor model\.norm\.wieght\. The nearest .* is model\.norm\.weight"),
    ):
        checkpoint.get("model.norm.wieght")


def test_reading_ahead_changes_nothing_and_survives_closing(tmp_path: Path) -> None:
    values = {f"w{number}": torch.full((300, 50), float(number)) for number in range(5)}
    checkpoint = open_checkpoint(folder_with(tmp_path, values))
    checkpoint.prefetch(dict.fromkeys(checkpoint.names()))
    assert torch.equal(checkpoint.get("w3"), values["w3"])
    checkpoint.prefetch({"w1": (slice(0, 1),)})
    checkpoint.close()


def shards(tmp_path: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{}")
    if weight_map is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


MAP = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_shards_are_one_checkpoint_with_the_tensors_of_the_index(tmp_path: Path) -> None:
    with open_checkpoint(shards(tmp_path, MAP)) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert checkpoint.get("b").tolist() == [0, 0, 0]


def test_shards_without_an_index_are_all_taken(tmp_path: Path) -> None:
    with open_checkpoint(shards(tmp_path)) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b", "c"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (shards(tmp_path, MAP) / MAP["b"]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files: model-00002-of-00002.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files: model-00002-of-00002.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "places tensor a in 3, which is no file of this folder"),
        ('{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}', "is no file of this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is no file of this folder"),
        ('{"weight_map": {"z": "model-00001-of-00002.safetensors"}}', "places tensor z in .*, which does not have it"),
        ("{", "is not valid JSON"),
    ],
)
def test_broken_indexes_are_refused(tmp_path: Path, index: str, message: str) -> None:
    (shards(tmp_path) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, shards(tmp_path) / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="Tensor b is in"):
        open_checkpoint(tmp_path)


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{,}     ", b"", "header is not JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "header is not JSON"),
    "not an object": ([1], b"", "header is not a JSON object"),
    "endless nesting": (b"[" * 100_000, b"", "header is not JSON"),
    "the same tensor twice": (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}', b"", "names 'w' twice"),
    "a tensor that is a number": ({"w": 3}, b"", "tensor w is described as 3"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "tensor w is described as"),
    "one offset": ({"w": entry(offsets=[0])}, bytes(8), "tensor w is described as"),
    "a negative offset": ({"w": entry(offsets=[-8, 0])}, bytes(8), "tensor w is described as"),
    "a fractional size": ({"w": entry(shape=[2.0])}, bytes(8), "tensor w is described as"),
    "a negative size": ({"w": entry(shape=[-2, -1])}, bytes(8), "tensor w is described as"),
    "an unknown dtype": ({"w": entry("F4")}, bytes(8), "tensor w has dtype 'F4'; mii reads .*BF16"),
    "a dtype that is a list": ({"w": entry(["F32"])}, bytes(8), "tensor w has dtype"),
    "too few bytes for the shape": ({"w": entry(shape=[3])}, bytes(8), "of shape .3. and dtype F32 is given 8"),
    "a shape beyond all memory": ({"w": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "is given 8"),
    "offsets past the end": ({"w": entry(offsets=[800, 808])}, bytes(8), "truncated: tensor w ends at byte"),
    "overlapping tensors": ({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12), "tensors v and w overlap"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(by_hand(tmp_path, header, data))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"a": torch.zeros(4, 4), "b": torch.zeros(9)})
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in range(1, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(folder)


def test_a_huge_header_length_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="claims a header of 18446744073709551615 bytes"):
        open_checkpoint(by_hand(tmp_path, {}, length=2**64 - 1))
    with pytest.raises(CheckpointError, match="its header needs 50000008 bytes"):
        open_checkpoint(by_hand(tmp_path, {}, length=50_000_000))


def test_the_header_of_the_library_s_own_files_is_read_alike(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {f"layers.{n}.w": torch.randn(n + 1, 3, dtype=torch.bfloat16) for n in range(9)}
    path = folder_with(tmp_path, tensors) / "model.safetensors"
    entries = read_header(MappedFile(path))
    with safe_open(path, "pt") as library:
        assert sorted(entries) == sorted(library.keys())
        for name, found in entries.items():
            assert torch.equal(found.file.tensor(found.start, found.dtype, found.shape), library.get_tensor(name))
