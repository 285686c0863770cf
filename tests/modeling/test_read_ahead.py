"""Tensors that threads read ahead are those of the file, whatever is asked for, and errors reach whoever takes them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mii.errors import CheckpointError
from mii.modeling.checkpoint import open_checkpoint, read_ahead
from mii.modeling.checkpoint.read_ahead import ReadAhead, Waitable, reads_ahead
from mii.modeling.decoder import Decoder
from mii.modeling.models import load_model
from mii.modeling.parameters import Linear


class Through:
    """The event of a device that copies at once."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class Here(ReadAhead):
    """With the CPU in the place of the GPU."""

    def _buffer(self) -> torch.Tensor:
        return torch.empty(read_ahead._CHUNK, dtype=torch.uint8)

    def _event(self) -> Waitable:
        return Through()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int32]
    tensors = {f"t{i}": (1000 * torch.randn(1 + 37 * i % 91, 129)).to(dtypes[i % 3]) for i in range(40)}
    tensors["empty"] = torch.empty(0, 5)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.fixture
def ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadAhead]:
    """Chunks much smaller than tensors, and few buffers."""
    monkeypatch.setattr(read_ahead, "_CHUNK", 1000)
    with Here(open_checkpoint(folder), torch.device("cpu"), threads=3) as reader:
        yield reader


def expected(folder: Path, name: str) -> torch.Tensor:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.get(name).clone()


def test_every_tensor_is_that_of_the_file(ahead: ReadAhead, folder: Path) -> None:
    names = sorted(ahead.names())
    ahead.prefetch(names)
    for name in names:
        tensor = ahead.get(name)
        assert torch.equal(tensor, expected(folder, name))
        assert tensor.dtype == expected(folder, name).dtype


def test_parts_and_other_dtypes_of_one_tensor(ahead: ReadAhead, folder: Path) -> None:
    ahead.prefetch(["t3", "t4"])
    whole = expected(folder, "t3")
    assert torch.equal(ahead.get("t3", torch.float64, (slice(2, 9),)), whole[2:9].double())
    assert torch.equal(ahead.get("t3", None, (slice(None), slice(5, 7))), whole[:, 5:7])
    assert torch.equal(ahead.get("t4", torch.float32), expected(folder, "t4").float())


def test_another_order_and_what_was_not_announced(ahead: ReadAhead, folder: Path) -> None:
    ahead.prefetch(["t1", "t2", "t3", "t30", "t31", "t32"])
    for name in ("t1", "t3", "t2", "t5", "t30"):
        assert torch.equal(ahead.get(name), expected(folder, name))


def test_a_file_that_shrinks_is_an_error_for_whoever_takes(tmp_path: Path, folder: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 6000)
    with Here(checkpoint, torch.device("cpu")) as reader:
        reader.prefetch(sorted(reader.names()))
        with pytest.raises(CheckpointError, match="became shorter"):
            _ = [reader.get(name) for name in sorted(reader.names())]


def test_closing_early_leaves_no_thread(ahead: ReadAhead) -> None:
    ahead.prefetch(sorted(ahead.names()))
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mii-read-ahead"]


def weights_of(model: Decoder) -> dict[str, torch.Tensor]:
    """All of them, those of products as they were packed."""
    packed = {path: part.packed.data for path, part in model.modules() if isinstance(part, Linear) and part.packed}
    assert packed
    return packed | {path: parameter.tensor for path, parameter in model.parameters()}


def test_a_model_read_ahead_is_the_model(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", 4000)
    path = make_checkpoint()
    device = torch.device("cpu")
    with open_checkpoint(path) as checkpoint:
        plain = weights_of(load_model(checkpoint, device, torch.float32))
    with Here(open_checkpoint(path), device, threads=2) as reader:
        read = weights_of(load_model(reader, device, torch.float32))
        assert not reader._stopped  # they were taken in the order that was announced
    assert plain.keys() == read.keys()
    assert all(torch.equal(plain[name], read[name]) for name in plain)


def test_it_serves_gpus_and_files_that_hold_tensors_as_they_are(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert reads_ahead(checkpoint, torch.device("cuda"))
        assert not reads_ahead(checkpoint, torch.device("cpu"))
    with Here(open_checkpoint(folder), torch.device("cpu")) as reader:  # it has no `location`
        assert not reads_ahead(reader, torch.device("cuda"))
