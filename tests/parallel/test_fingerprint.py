"""The digest by which ranks compare their checkpoints: what it notices, and how little it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii.modeling.checkpoint import checkpoint_size, open_checkpoint
from mii.parallel import fingerprint
from mii.parallel.fingerprint import digest_of

SHAPES = {"wide": (300, 64), "vector": (100,), "experts": (5, 30, 16), "scalar": (), "none": (0, 4)}


def write(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> Path:
    """A checkpoint, after a change."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def digest(folder: Path) -> str:
    with open_checkpoint(str(folder)) as checkpoint:
        return digest_of(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(wide=tensors["wide"] * 1.001),
        lambda tensors: tensors["wide"][100:150].zero_(),  # a hole
        lambda tensors: tensors["wide"][:, 40].add_(1),  # a column, as an adapter of rank one changes it
        lambda tensors: tensors["vector"][57].add_(1e-3),
        lambda tensors: tensors["experts"][2].mul_(2),
        lambda tensors: tensors["scalar"].add_(1),
        lambda tensors: tensors.update(wide=tensors["wide"].bfloat16()),
        lambda tensors: tensors.update(wide=tensors["wide"].reshape(64, 300)),
        lambda tensors: tensors.update(more=torch.zeros(1)),
        lambda tensors: tensors.update(vector=tensors["vector"].flip(0)),
    ],
)
def test_checkpoints_that_differ_have_other_digests(tmp_path: Path, change: Any) -> None:
    assert digest(write(tmp_path / "a")) == digest(write(tmp_path / "b"))
    assert digest(write(tmp_path / "a")) != digest(write(tmp_path / "c", change))


def test_a_hole_in_a_large_tensor_is_found_and_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_STRIDE_BYTES", 1 << 16)
    rows = 16384
    folder = write(tmp_path / "a", lambda tensors: tensors.update(large=torch.ones(rows, 64)))  # 4 MiB
    before, read = digest(folder), 0
    with open_checkpoint(str(folder)) as checkpoint:
        get = checkpoint.get

        def counted(*arguments: Any) -> torch.Tensor:
            nonlocal read
            part = get(*arguments)
            read += part.nbytes
            return part

        monkeypatch.setattr(checkpoint, "get", counted)
        assert digest_of(checkpoint) == before
        assert read < 0.02 * checkpoint_size(checkpoint)
    tensors = load_file(folder / "model.safetensors")
    tensors["large"][5000:5300].zero_()
    save_file(tensors, folder / "model.safetensors")
    assert digest(folder) != before


def test_a_gguf_file_has_a_digest(smollm2: Path) -> None:
    with open_checkpoint(str(smollm2)) as checkpoint:
        assert digest_of(checkpoint) == digest_of(checkpoint)
